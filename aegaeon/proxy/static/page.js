// The page: asks once a second, lets each part draw what came.
import { Playground } from "./playground.js";
import { Memory } from "./spans.js";
import { drawDecisions, drawModels } from "./tables.js";
import { drawTimeline } from "./timeline.js";
import { getJson, key, send } from "./server.js";

const EVERY_MS = 1000;
const get = (id) => document.getElementById(id);
const memory = new Memory();
const playground = new Playground();
let isPaused = false;

const theme = {
  now: () => document.documentElement.dataset.theme,
  set(name) {
    document.documentElement.dataset.theme = name;
    localStorage.setItem("aegaeon-theme", name);
  },
  start() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = localStorage.getItem("aegaeon-theme") ?? (dark ? "dark" : "light");
  },
};

function trouble(text) {
  get("trouble").hidden = !text;
  get("trouble").textContent = text;
}

function badge(health) {
  const kinds = { ok: "ok", draining: "warn", unavailable: "bad" };
  get("status").className = `badge ${kinds[health.status] ?? "bad"}`;
  const open = health.open_requests;
  get("status").textContent = `${health.status}, ${open} open request${open === 1 ? "" : "s"}`;
}

// Figures of each model, where the server tells them; a key may not be allowed to ask.
async function figures() {
  const told = await getJson("/admin/status");
  return new Map(told.models.map((one) => [one.id, one]));
}

async function act(model, verb) {
  try {
    await send("POST", `/admin/models/${encodeURIComponent(model)}/${verb}`);
    trouble("");
  } catch (error) {
    trouble(`cannot ${verb} ${model}: ${error.message}`);
  }
}

async function look() {
  const [health, listed] = await Promise.all([
    getJson("/health", { accept: [503] }),
    getJson("/v1/models"),
  ]);
  badge(health);
  playground.offer(listed.data.map((model) => model.id));
  const instances = health.instances;
  const [told, byModel] = await Promise.all([getJson("/admin/decisions?limit=1000"), figures()]);
  drawModels(get("model-rows"), { models: listed.data, instances, figures: byModel, act });
  const nowS = told.now_s;
  const decisions = memory.take(told.decisions, nowS);
  if (isPaused) return;
  const windowS = Number(get("window").value);
  drawTimeline(get("lanes"), get("lanes-words"), { decisions, instances, nowS, windowS });
  drawDecisions(get("decision-rows"), decisions, nowS);
}

async function turn() {
  try {
    if (!document.hidden) {
      await look();
      trouble("");
    }
  } catch (error) {
    get("status").className = "badge bad";
    get("status").textContent = error.status ? "no access" : "no connection";
    trouble(error.status === 401 ? `${error.message}: enter an API key above` : error.message);
  }
  setTimeout(turn, EVERY_MS);
}

theme.start();
get("theme").addEventListener("click", () => theme.set(theme.now() === "dark" ? "light" : "dark"));
get("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  get("pause").setAttribute("aria-pressed", String(isPaused));
  get("pause").textContent = isPaused ? "Go on" : "Pause";
});
get("key").value = key.get();
get("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(get("key").value.trim());
});
turn();
