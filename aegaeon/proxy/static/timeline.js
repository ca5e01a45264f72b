// The lanes: who computes, what comes in, when the device changed hands. Drawn by Plotly.
import { colourOf } from "./colours.js";
import { toSpans } from "./spans.js";

const LANE_PX = 56;
const COMPUTE = { width: 0.5, offset: -0.15 };
const LOAD = { width: 0.14, offset: -0.42 };

export function drawTimeline(place, words, { decisions, instances, nowS, windowS }) {
  const lanes = toSpans(decisions, nowS);
  const names = [...new Set([...instances.map((one) => one.id), ...lanes.keys()])].sort();
  const from = nowS - windowS;
  const traces = [...computing(lanes, from, nowS), ...loading(lanes, from, nowS)];
  traces.push(switching(lanes, from, nowS));
  window.Plotly.react(place, traces, layout(names, windowS), { displayModeBar: false, responsive: true });
  words.textContent = inWords(instances);
}

function bars(spans, nowS, lane, shape, name, colour) {
  return {
    type: "bar",
    orientation: "h",
    name,
    marker: { color: colour },
    width: shape.width,
    offset: shape.offset,
    y: spans.map(lane),
    base: spans.map((span) => span.start - nowS),
    x: spans.map((span) => Math.max(span.end - span.start, 0.005)),
  };
}

function byModel(lanes, kind, from) {
  const found = new Map();
  for (const [instance, lane] of lanes)
    for (const span of lane[kind]) {
      if (span.end < from) continue;
      if (!found.has(span.model)) found.set(span.model, []);
      found.get(span.model).push({ ...span, instance, start: Math.max(span.start, from) });
    }
  return found;
}

function computing(lanes, from, nowS) {
  return [...byModel(lanes, "spans", from)].map(([model, spans]) => ({
    ...bars(spans, nowS, (span) => span.instance, COMPUTE, model, colourOf(model)),
    text: spans.map((span) => span.action),
    hovertemplate: "%{text} of " + escaped(model) + ", %{x:.2f} s on %{y}<extra></extra>",
    textposition: "none",
    legendgroup: model,
  }));
}

function loading(lanes, from, nowS) {
  return [...byModel(lanes, "loads", from)].map(([model, spans]) => ({
    ...bars(spans, nowS, (span) => span.instance, LOAD, model, colourOf(model)),
    opacity: 0.7,
    hovertemplate: "weights of " + escaped(model) + " come in, %{x:.2f} s, to %{y}<extra></extra>",
    showlegend: false,
    legendgroup: model,
  }));
}

function switching(lanes, from, nowS) {
  const x = [], y = [], text = [];
  for (const [instance, lane] of lanes)
    for (const one of lane.switches)
      if (one.at >= from) {
        x.push(one.at - nowS);
        y.push(instance);
        text.push(escaped(one.model ?? ""));
      }
  const marker = { symbol: "line-ns", size: 26, line: { width: 2, color: ink() } };
  const hovertemplate = "switch to %{text}<extra></extra>";
  return { type: "scatter", mode: "markers", name: "switch", x, y, text, marker, hovertemplate };
}

function layout(names, windowS) {
  const grid = styled("--line");
  return {
    height: 130 + LANE_PX * Math.max(names.length, 1),
    margin: { l: 10, r: 10, t: 10, b: 40 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: ink(), family: "inherit", size: 13 },
    barmode: "overlay",
    xaxis: { range: [-windowS, 0], title: { text: "seconds ago" }, gridcolor: grid, zeroline: false },
    yaxis: { type: "category", categoryarray: names, categoryorder: "array", range: [-0.6, names.length - 0.4],
      automargin: true, gridcolor: grid, ticksuffix: "  " },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    uirevision: "kept",
  };
}

function inWords(instances) {
  if (!instances.length) return "No instance lives.";
  return instances
    .map((one) => {
      const coming = one.loading ? `, ${one.loading} comes in` : "";
      return `${one.id} (${one.device}): ${one.current ?? "no model"}${coming}, ${one.switches} switches`;
    })
    .join(" · ");
}

const styled = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const ink = () => styled("--text");
// Plotly reads a few tags in what it is given as text; names of models come from people.
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll("%", "%\u200b");
