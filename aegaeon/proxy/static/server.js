// Talks to the server: JSON, and answers that stream.

const KEY = "aegaeon-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

function headers(extra = {}) {
  return key.get() ? { authorization: `Bearer ${key.get()}`, ...extra } : extra;
}

async function checked(answer) {
  if (answer.ok) return answer;
  let message = `status ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not ours, so there is no more to say
  }
  throw new Refused(answer.status, message);
}

export async function getJson(path, { accept = [] } = {}) {
  const answer = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(10_000) });
  return (accept.includes(answer.status) ? answer : await checked(answer)).json();
}

export async function send(method, path, body) {
  const sent = { method, headers: headers({ "content-type": "application/json" }) };
  if (body !== undefined) sent.body = JSON.stringify(body);
  await checked(await fetch(path, sent));
}

// Yields the chunks of a streamed chat completion. Throws what the stream tells as an error.
export async function* chat(body, signal) {
  const answer = await checked(
    await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    }),
  );
  for await (const line of lines(answer.body)) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    const chunk = JSON.parse(line.slice(6));
    if (chunk.error) throw new Refused(0, chunk.error.message);
    yield chunk;
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}
