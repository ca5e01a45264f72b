// From decisions to what the timeline shows. Pure: no page, no clock.

// Decisions of an instance, in order, become spans of its lane: each goes on until the next one;
// the last one until it was last taken, or until now while it is fresh.
const FRESH_S = 2;

export function toSpans(decisions, nowS) {
  const lanes = new Map();
  for (const { instance, decision } of decisions) {
    if (!lanes.has(instance)) lanes.set(instance, { computing: [], loading: [], switches: [] });
    const lane = lanes.get(instance);
    if (decision.action === "load") lane.loading.push(decision);
    else lane.computing.push(decision);
  }
  return new Map([...lanes].map(([name, lane]) => [name, laneSpans(lane, nowS)]));
}

function laneSpans({ computing, loading }, nowS) {
  const spans = [];
  const switches = [];
  const apart = inTurn(computing);
  apart.forEach((one, index) => {
    const next = apart[index + 1];
    const end = next ? next.at_s : nowS - one.until_s < FRESH_S ? nowS : one.until_s;
    if (one.action === "switch") switches.push({ at: one.at_s, model: one.model });
    else if (one.model && one.action !== "idle") extend(spans, one, Math.max(end, one.until_s));
  });
  return { spans, switches, loads: loading.map((one) => loadSpan(one, computing, nowS)) };
}

// While models take turns of a few steps, what they do overlaps for a second or so: each step gets its
// share of that.
function inTurn(computing) {
  const apart = [];
  for (let first = 0; first < computing.length; ) {
    let end = computing[first].until_s;
    let next = first + 1;
    for (; next < computing.length && computing[next].at_s < end; next++)
      end = Math.max(end, computing[next].until_s);
    const together = computing.slice(first, next);
    const steps = together.filter((one) => one.action !== "switch");
    const share = (end - together[0].at_s) / steps.length;
    if (steps.length < 2) apart.push(...together);
    else {
      apart.push(...together.filter((one) => one.action === "switch"));
      steps.forEach((one, index) => {
        const at_s = together[0].at_s + index * share;
        apart.push({ ...one, at_s, until_s: at_s + share });
      });
    }
    first = next;
  }
  return apart;
}

// A batch that grows or shrinks by a request is another decision, but the same to look at.
function extend(spans, { at_s, model, action }, end) {
  const last = spans.at(-1);
  if (last && last.model === model && last.action === action && at_s - last.end < 0.05) last.end = end;
  else spans.push({ model, action, start: at_s, end });
}

// Weights are in, at the latest, when their model computes.
function loadSpan(load, computing, nowS) {
  const first = computing.find(
    (one) => one.model === load.model && one.action !== "switch" && one.at_s >= load.at_s,
  );
  const end = first ? first.at_s : Math.min(nowS, load.until_s + 60);
  return { model: load.model, evicted: load.evicted, start: load.at_s, end };
}

// Keeps what was told before: answers hold the last few hundred decisions only.
export class Memory {
  constructor(keepS = 330) {
    this.keepS = keepS;
    this.told = new Map();
  }

  take(decisions, nowS) {
    for (const one of decisions) {
      const d = one.decision;
      this.told.set(`${one.instance}|${d.at_s}|${d.action}|${d.model}`, one);
    }
    for (const [name, one] of this.told)
      if (one.decision.until_s < nowS - this.keepS) this.told.delete(name);
    return [...this.told.values()].sort((a, b) => a.decision.at_s - b.decision.at_s);
  }
}
