// A colour for each model, the same wherever it is shown; told apart by those who see few colours
// (after Okabe and Ito), then by shades.
const BASE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#b8a500"];
const known = new Map();

export function colourOf(model) {
  if (!known.has(model)) known.set(model, shade(known.size));
  return known.get(model);
}

function shade(index) {
  const base = BASE[index % BASE.length];
  const round = Math.floor(index / BASE.length) % 3;
  if (round === 0) return base;
  const towards = round === 1 ? 255 : 0;
  const parts = [1, 3, 5].map((at) => parseInt(base.slice(at, at + 2), 16));
  const mixed = parts.map((part) => Math.round(part + (towards - part) * 0.45));
  return `#${mixed.map((part) => part.toString(16).padStart(2, "0")).join("")}`;
}
