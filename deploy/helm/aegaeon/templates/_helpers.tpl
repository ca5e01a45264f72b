{{/* The name of all that a release has. */}}
{{- define "aegaeon.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "aegaeon.labels" -}}
app.kubernetes.io/name: aegaeon
app.kubernetes.io/instance: {{ include "aegaeon.name" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "aegaeon.image" -}}
image: {{ printf "%s:%s" .Values.image.repository .Values.image.tag | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* What a container may do: nothing. */}}
{{- define "aegaeon.confined" -}}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "aegaeon.user" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "aegaeon.volumes" -}}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.models.existingClaim | default (printf "%s-models" (include "aegaeon.name" .)) }}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory }}
{{- if .Values.keysSecret }}
- name: keys
  secret:
    secretName: {{ .Values.keysSecret }}
{{- end }}
{{- end }}

{{- define "aegaeon.mounts" -}}
- name: models
  mountPath: /models
- name: shared-memory
  mountPath: /dev/shm
{{- if .Values.keysSecret }}
- name: keys
  mountPath: /run/secrets/aegaeon
  readOnly: true
{{- end }}
{{- end }}

{{/* Where Redis is, for mode cluster. Its password is read from the file at each connection. */}}
{{- define "aegaeon.redis" -}}
{{- $address := .Values.redis.address | default (printf "%s-redis:6379" (include "aegaeon.name" .)) -}}
redis://{{ $address }}/0?password_file=/run/secrets/redis/password
{{- end }}
