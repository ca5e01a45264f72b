// Asks two models the same at once, and shows both answers as they come.
import { chat } from "./server.js";

const get = (id) => document.getElementById(id);

export class Playground {
  constructor() {
    this.stopping = null;
    get("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    get("stop").addEventListener("click", () => this.stopping?.abort());
  }

  // The models to choose from; what was chosen stays while it is served.
  offer(names) {
    [0, 1].forEach((pane) => {
      const select = get(`model-${pane}`);
      const offered = [...select.options].map((option) => option.value);
      if (offered.join("\n") === names.join("\n")) return;
      const chosen = names.includes(select.value) ? select.value : names[Math.min(pane, names.length - 1)];
      select.replaceChildren(...names.map((name) => new Option(name, name)));
      select.value = chosen ?? "";
    });
  }

  async ask() {
    this.stopping = new AbortController();
    get("ask").disabled = true;
    get("stop").disabled = false;
    await Promise.all([0, 1].map((pane) => this.answer(pane, this.stopping.signal)));
    get("ask").disabled = false;
    get("stop").disabled = true;
  }

  async answer(pane, signal) {
    const out = get(`answer-${pane}`);
    const told = new Told(get(`figures-${pane}`));
    out.textContent = "";
    out.classList.remove("failed");
    const body = {
      model: get(`model-${pane}`).value,
      messages: [{ role: "user", content: get("prompt").value }],
      max_tokens: Number(get("max-tokens").value),
    };
    try {
      for await (const chunk of chat(body, signal)) {
        signal.throwIfAborted(); // more may have come before: nobody wants it
        out.textContent += chunk.choices[0]?.delta?.content ?? "";
        told.take(chunk);
      }
      told.end();
    } catch (error) {
      if (signal.aborted) return told.end("stopped"); // whatever a stream that breaks off calls it
      out.classList.add("failed");
      out.textContent += error.message;
    }
  }
}

class Told {
  constructor(place) {
    this.place = place;
    this.began = performance.now();
    this.first = null;
    this.usage = null;
    this.waited = null;
    place.textContent = "waiting";
  }

  take(chunk) {
    if (chunk.choices[0]?.delta?.content) this.first ??= performance.now();
    this.usage = chunk.usage ?? this.usage;
    if (chunk.aegaeon?.queue_ms != null) this.waited = chunk.aegaeon;
    if (this.first) this.place.textContent = `first token after ${this.ms(this.first)}`;
  }

  ms(until) {
    return `${Math.round(until - this.began)} ms`;
  }

  end(how = "done") {
    const parts = [how, `first token after ${this.first ? this.ms(this.first) : "–"}`];
    if (this.usage && this.first) {
      const tookS = (performance.now() - this.first) / 1000;
      const tokens = this.usage.completion_tokens;
      parts.push(`${tokens} tokens, ${(tokens / Math.max(tookS, 1e-3)).toFixed(1)} a second`);
    }
    if (this.waited) {
      const { queue_ms: queue, switch_ms: switching, switches, preempted_ms: preempted } = this.waited;
      parts.push(
        `queued ${Math.round(queue)} ms, ${switches} switches in ${Math.round(switching)} ms, ` +
          `pre-empted for ${Math.round(preempted)} ms`,
      );
    }
    this.place.textContent = parts.join(" · ");
  }
}
