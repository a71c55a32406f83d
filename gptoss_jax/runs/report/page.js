"use strict";
// Values under the pointer, and the search in the config. The charts themselves need no script.
const number = (v) => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));

function nearest(sorted, x) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle; else high = middle;
  }
  return x - sorted[low] < sorted[high] - x ? low : high;
}

function lines(data, x) {
  const step = data.lo + (x - data.l) / (data.r - data.l) * (data.hi - data.lo);
  const found = data.s.map((s) => ({ s, i: nearest(s.x, step) }));
  const best = found.reduce((a, b) => Math.abs(b.s.x[b.i] - step) < Math.abs(a.s.x[a.i] - step) ? b : a);
  const at = best.s.x[best.i];
  const rows = found.map(({ s, i }) => {
    const when = s.x[i] === at ? "" : " (step " + s.x[i] + ")";
    return { colour: s.c, text: s.n + " " + number(s.y[i]) + when };
  });
  const px = data.l + (at - data.lo) / (data.hi - data.lo) * (data.r - data.l);
  return { px, rows: [{ text: "step " + at }, ...rows] };
}

function cell(data, x, y) {
  const width = data.cols.length;
  const column = Math.floor((x - data.l) / (data.r - data.l) * width);
  const row = Math.floor((y - data.t) / (data.b - data.t) * data.rows);
  if (column < 0 || row < 0 || column >= width || row >= data.rows) return null;
  data.bytes ??= atob(data.v);
  const value = data.bytes.charCodeAt(row * width + column) / data.u;
  const text = (value >= 255 / data.u ? "at least " : "") + number(value) + " of a fair share";
  return { px: x, rows: [{ text: data.col + " " + data.cols[column] + ", " + data.row + " " + row }, { text }] };
}

for (const figure of document.querySelectorAll("figure")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg");
  const heat = figure.classList.contains("heat");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  figure.append(tip);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const x = (event.clientX - box.left) / box.width * view.width;
    const y = (event.clientY - box.top) / box.height * view.height;
    const found = heat ? cell(data, x, y) : lines(data, Math.min(Math.max(x, data.l), data.r));
    tip.hidden = !found;
    if (!found) return;
    tip.replaceChildren(...found.rows.map(({ colour, text }) => {
      const row = document.createElement("div");
      if (colour !== undefined) {
        const dot = document.createElement("i");
        dot.style.background = "var(--c" + colour + ")";
        row.append(dot);
      }
      row.append(text);
      return row;
    }));
    if (!heat) {
      for (const [name, value] of Object.entries({ x1: found.px, x2: found.px, y1: 10, y2: view.height - 26 }))
        cursor.setAttribute(name, value);
      svg.append(cursor);
    }
    const outer = figure.getBoundingClientRect();
    const left = box.left - outer.left + found.px / view.width * box.width;
    const right = left + tip.offsetWidth + 14 > outer.width;
    tip.style.left = Math.max(2, right ? left - tip.offsetWidth - 10 : left + 10) + "px";
    tip.style.top = box.top - outer.top + 8 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.remove(); });
}

for (const config of document.querySelectorAll(".config")) {
  const search = config.querySelector("input[type=search]"), only = config.querySelector("input[type=checkbox]");
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    for (const section of config.querySelectorAll("details")) {
      let shown = 0;
      for (const row of section.querySelectorAll("tbody tr")) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted) || (only.checked && !row.classList.contains("set"));
        shown += !row.hidden;
      }
      section.hidden = !shown;
      if (wanted || only.checked) section.open = shown > 0;
    }
  };
  search.addEventListener("input", filter);
  only.addEventListener("change", filter);
}
