"use strict";
// The explorer: choose a model, block, interval and memory among the cells of the sweep; curve and numbers follow.
// Everything that comes from files reaches the page as text content, never as markup.
(() => {
  const holder = document.getElementById("cells");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const byId = (id) => document.getElementById(id);
  const NO_INTERVAL = "none";
  const UNLIMITED = "unlimited";
  const cells = data.rows.map((row) => Object.fromEntries(data.columns.map((name, index) => [name, row[index]])));
  const choice = { ...data.start };

  const intervalKey = (cell) => (cell.interval === null ? NO_INTERVAL : String(cell.interval));
  const memoryKey = (cell) => (cell.memory === null ? UNLIMITED : String(cell.memory));
  const distinct = (values) => [...new Set(values)];
  const percent = (share) => (100 * share).toFixed(2) + "%";
  const tokens = (count) => count.toLocaleString("en-US");
  const rate = (cell, name) => cell[name] / data.prompt_tokens;

  function sizeName(key) {
    if (key === UNLIMITED) return key;
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let size = Number(key), unit = 0;
    while (size >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
    return `${Number(size.toPrecision(4))} ${units[unit]}`;
  }

  const byMemory = (a, b) => (a.memory ?? Infinity) - (b.memory ?? Infinity);
  const ofModel = () => cells.filter((cell) => cell.model === choice.model);
  const ofBlock = () => ofModel().filter((cell) => String(cell.block) === choice.block);
  const ofInterval = (key) => ofBlock().filter((cell) => intervalKey(cell) === key).sort(byMemory);

  function nearest(keys, wanted) {
    if (keys.includes(wanted)) return wanted;
    const place = (key) => (key === UNLIMITED || key === NO_INTERVAL ? Infinity : Math.log(Number(key)));
    const distance = (key) => Math.abs(place(key) - place(wanted));
    const numbers = keys.filter((key) => Number.isFinite(place(key)));
    if (!numbers.length || !Number.isFinite(place(wanted))) return keys[keys.length - 1];
    return numbers.reduce((best, key) => (distance(key) < distance(best) ? key : best));
  }

  // What was chosen may not exist for another model: the nearest that does takes its place.
  function settle() {
    const models = distinct(cells.map((cell) => cell.model));
    if (!models.includes(choice.model)) choice.model = models[0];
    choice.block = nearest(distinct(ofModel().map((cell) => String(cell.block))), choice.block);
    choice.interval = nearest(distinct(ofBlock().map(intervalKey)), choice.interval);
    choice.memory = nearest(ofInterval(choice.interval).map(memoryKey), choice.memory);
  }

  function fill(id, keys, chosen, name) {
    byId(id).replaceChildren(...keys.map((key) => new Option(name(key), key, false, key === chosen)));
  }

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Both ends, and as many sizes between them as have room for their names.
  function ticks(sizes, x) {
    const last = sizes[sizes.length - 1];
    const kept = [];
    for (const size of sizes) {
      const before = kept.length ? kept[kept.length - 1][0] : -Infinity;
      const fits = x(size) - before >= (kept.length === 1 ? 100 : 80) && (size === last || x(last) - x(size) >= 100);
      if (!kept.length || size === last || fits) kept.push([x(size), size]);
    }
    return kept;
  }

  const intervalName = (key) => (key === NO_INTERVAL ? "no SSM layers" : `${key} tokens`);
  const colour = (index) => `var(--c${index % 8})`;

  function draw(intervals, chosen) {
    const chart = byId("chart");
    const width = Math.max(280, chart.clientWidth), height = width < 500 ? 240 : 320;
    const left = 46, right = 14, top = 12, bottom = 44;
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const drawn = ofBlock();
    const sizes = distinct(drawn.filter((cell) => cell.memory !== null).map((cell) => cell.memory)).sort((a, b) => a - b);
    const highest = Math.max(...drawn.map((cell) => rate(cell, "ceiling")), 0.001) * 1.06;
    const first = Math.log(sizes[0] ?? 1), span = Math.log(sizes[sizes.length - 1] ?? 2) - first || 1;
    const x = (memory) => left + (sizes.length < 2 ? 0.5 : (Math.log(memory) - first) / span) * (width - left - right);
    const y = (share) => height - bottom - (share / highest) * (height - top - bottom);
    const parts = [];
    const step = [0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2].find((size) => highest / size <= 6) ?? 0.2;
    for (let share = 0; share <= highest; share += step) {
      parts.push(element("line", { class: "grid", x1: left, x2: width - right, y1: y(share), y2: y(share) }));
      parts.push(element("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, `${Number((100 * share).toPrecision(3))}%`));
    }
    for (const [place, size] of ticks(sizes, x)) {
      parts.push(element("line", { class: "grid", x1: place, x2: place, y1: height - bottom, y2: height - bottom + 5 }));
      const anchor = sizes.length < 2 ? "middle" : size === sizes[0] ? "start" : size === sizes[sizes.length - 1] ? "end" : "middle";
      parts.push(element("text", { x: place, y: height - bottom + 18, "text-anchor": anchor }, sizeName(String(size))));
    }
    parts.push(element("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, "cache memory; dashed: unlimited"));
    intervals.forEach((key, index) => {
      const line = ofInterval(key), is = key === choice.interval, stroke = colour(index);
      const points = line.filter((cell) => cell.memory !== null).map((cell) => `${x(cell.memory)},${y(rate(cell, "usable"))}`);
      const style = { fill: "none", stroke, "stroke-width": is ? 3 : 1.2, opacity: is ? 1 : 0.6 };
      parts.push(element("polyline", { points: points.join(" "), ...style }));
      if (is) {
        const level = y(rate(line[0], "ceiling"));
        parts.push(element("line", { x1: left, x2: width - right, y1: level, y2: level, stroke, "stroke-dasharray": "6 4" }));
        if (chosen.memory !== null) {
          parts.push(element("circle", { cx: x(chosen.memory), cy: y(rate(chosen, "usable")), r: 6, fill: stroke, stroke: "var(--card)", "stroke-width": 2 }));
        }
      }
    });
    chart.replaceChildren(...parts);
    chart.setAttribute("aria-label", `Usable token hit rate against cache memory, ${choice.model}, block ${choice.block}; chosen: ` +
      `${intervalName(choice.interval)} at ${sizeName(choice.memory)}, ${percent(rate(chosen, "usable"))}`);
  }

  function legend(intervals) {
    byId("legend").replaceChildren(...intervals.map((key, index) => {
      const item = document.createElement("li"), button = document.createElement("button"), swatch = document.createElement("i");
      swatch.style.background = colour(index);
      button.type = "button";
      button.setAttribute("aria-pressed", String(key === choice.interval));
      button.append(swatch, intervalName(key));
      button.addEventListener("click", () => {
        change({ interval: key });
        byId("legend").children[index].firstChild.focus();
      });
      item.append(button);
      return item;
    }));
  }

  function numbers(chosen) {
    for (const part of document.querySelectorAll("[data-tokens]")) part.textContent = tokens(chosen[part.dataset.tokens]);
    for (const part of document.querySelectorAll("[data-rate]")) part.textContent = percent(rate(chosen, part.dataset.rate));
    for (const part of byId("bar").children) part.style.width = percent(rate(chosen, part.dataset.part));
    const rivals = ofBlock().filter((cell) => cell.memory === chosen.memory);
    const best = rivals.reduce((a, b) => (b.usable > a.usable ? b : a));
    byId("said").textContent = `${choice.model}, block ${choice.block}, ${chosen.interval === null ? "no SSM layers" : `interval ${chosen.interval}`}, ` +
      `${sizeName(choice.memory)}: usable token hit rate ${percent(rate(chosen, "usable"))} of a ceiling of ${percent(rate(chosen, "ceiling"))}.` +
      (rivals.length > 1 ? ` Best interval at this memory: ${intervalName(intervalKey(best))}, ${percent(rate(best, "usable"))}.` : "");
  }

  function show() {
    settle();
    const intervals = distinct(ofBlock().map(intervalKey)), line = ofInterval(choice.interval);
    const chosen = line.find((cell) => memoryKey(cell) === choice.memory);
    fill("model", distinct(cells.map((cell) => cell.model)), choice.model, String);
    fill("block", distinct(ofModel().map((cell) => String(cell.block))), choice.block, (key) => `${key} tokens`);
    fill("interval", intervals, choice.interval, intervalName);
    const slider = byId("memory");
    slider.max = line.length - 1;
    slider.value = line.indexOf(chosen);
    slider.setAttribute("aria-valuetext", sizeName(choice.memory));
    byId("memory-name").textContent = sizeName(choice.memory);
    legend(intervals);
    draw(intervals, chosen);
    numbers(chosen);
  }

  function change(changed) {
    Object.assign(choice, changed);
    show();
    history.replaceState(null, "", "#" + new URLSearchParams(choice));
  }

  // A link to a heading has no "=": it leaves the choice as it is.
  function readAddress() {
    const asked = location.hash.slice(1);
    if (!asked.includes("=")) return;
    const given = new URLSearchParams(asked);
    for (const name of Object.keys(choice)) if (given.has(name)) choice[name] = given.get(name);
  }

  for (const name of ["model", "block", "interval"]) {
    byId(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
  byId("memory").addEventListener("input", (event) => change({ memory: memoryKey(ofInterval(choice.interval)[event.target.value]) }));
  window.addEventListener("hashchange", () => { readAddress(); show(); });
  window.addEventListener("resize", show);
  byId("explorer").hidden = false;
  readAddress();
  show();
})();
