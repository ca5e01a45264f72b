// The tables of models and of decisions. Text goes in as text, never as HTML.
import { colourOf } from "./colours.js";

function cell(text, kind = "") {
  const made = document.createElement("td");
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function named(model) {
  const made = document.createElement("td");
  const dot = document.createElement("span");
  dot.className = "dot";
  dot.style.backgroundColor = colourOf(model);
  dot.ariaHidden = "true";
  made.append(dot, model);
  return made;
}

const counted = (instances, kind, model) =>
  instances.reduce((sum, one) => sum + (one[kind][model] ?? 0), 0);

const seconds = (value) =>
  value == null ? "–" : value < 1 ? `${(1000 * value).toFixed(0)} ms` : `${value.toFixed(1)} s`;

function against(figures, target) {
  if (figures?.p50 == null) return cell("–", "number");
  const isLate = figures.p90 > target;
  const made = cell(`${seconds(figures.p50)} / ${seconds(figures.p90)}`, isLate ? "number late" : "number");
  made.title = `promised: ${seconds(target)}`;
  return made;
}

// `act(model, verb)` is called for a button; `figures` are by model, where they are to be had.
function whereabouts({ status, tier, progress }) {
  const share = progress == null ? "" : ` ${(100 * progress).toFixed(0)} %`;
  return `${status}${share}, on ${tier}`;
}

export function drawModels(body, { models, instances, figures, act }) {
  const active = document.activeElement?.dataset?.act;
  body.replaceChildren(
    ...models.map((model) => {
      const row = document.createElement("tr");
      const told = figures.get(model.id);
      row.append(
        named(model.id),
        cell(whereabouts(model)),
        cell(counted(instances, "waiting", model.id), "number"),
        cell(counted(instances, "running", model.id), "number"),
        against(told?.ttft_s, told?.slo_ttft_s),
        against(told?.tbt_s, told?.slo_tbt_s),
        cell(told?.attained == null ? "–" : `${(100 * told.attained).toFixed(0)} %`, "number"),
        actions(model, act),
      );
      return row;
    }),
  );
  if (active) body.querySelector(`[data-act="${CSS.escape(active)}"]`)?.focus();
}

function actions(model, act) {
  const made = document.createElement("td");
  const verbs = model.status === "idle" ? ["load"] : [];
  for (const verb of [...verbs, model.pinned ? "unpin" : "pin"]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = verb;
    button.dataset.act = `${verb} ${model.id}`;
    button.ariaLabel = `${verb} ${model.id}`;
    button.addEventListener("click", () => act(model.id, verb));
    made.append(button, " ");
  }
  return made;
}

export function drawDecisions(body, decisions, nowS, most = 60) {
  const newest = decisions.slice(-most).reverse();
  body.replaceChildren(
    ...newest.map(({ instance, decision }) => {
      const row = document.createElement("tr");
      row.append(
        cell((nowS - decision.at_s).toFixed(1), "number"),
        cell(instance),
        cell(decision.action),
        decision.model ? named(decision.model) : cell("–"),
        cell(decision.times, "number"),
        cell(because(decision)),
      );
      return row;
    }),
  );
}

function because({ reason, evicted }) {
  const words = (reason || "no reason given").replaceAll("_", " ");
  return evicted.length ? `${words}; ${evicted.join(", ")} made way` : words;
}
