"use strict";
(() => {
  // Often enough for a person who mends something and looks, and a few milliseconds of the agent's time a minute.
  const ASK_EVERY_MS = 5000;
  // A busy agent answers in milliseconds.
  const PATIENCE_MS = 5000;
  const HOUR = 3600;
  // Below this five times would touch each other.
  const NARROW = 420;
  const MARGIN = { left: 58, right: 8, top: 10, bottom: 22 };

  const byId = (id) => document.getElementById(id);
  const shown = {};
  let intervals = [];
  let every = 0;
  let answeredAt = new Date();
  let silentSince = null;
  let asking = false;
  let timer = 0;

  // ---- asking ---------------------------------------------------------------------------------------------

  async function ask(path) {
    const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(answer.statusText);
    return answer.json();
  }

  async function refresh() {
    if (asking || document.hidden) return;
    asking = true;
    clearTimeout(timer);
    const answers = await Promise.all([ask("figures"), ask("history")]).catch(() => null);
    asking = false;
    timer = setTimeout(refresh, ASK_EVERY_MS);
    if (answers === null) return tellSilence();
    const [figures, history] = answers;
    if (figures.edition !== document.documentElement.dataset.edition) return location.reload();
    tellAnswer();
    showFigures(figures.parts);
    remember(history);
    drawAll();
  }

  function tellAnswer() {
    answeredAt = new Date();
    tellConnection(silentSince ? `The agent answers again, since ${clock(answeredAt)}.` : "");
    silentSince = null;
    document.documentElement.classList.remove("stale");
  }

  function tellSilence() {
    silentSince ??= new Date();
    document.documentElement.classList.add("stale");
    document.title = "capture-agent: does not answer";
    tellConnection(
      `The agent does not answer since ${clock(silentSince)}. This page goes on asking;` +
      ` the figures below are of ${clock(answeredAt)}.`);
  }

  // Touched only when it changes, or a screen reader would read it every few seconds.
  function tellConnection(text) {
    if (byId("connection").textContent !== text) byId("connection").textContent = text;
  }

  // The agent has escaped all text in them; the policy of the page would run no script in it either.
  function showFigures(parts) {
    document.title = parts.title;
    for (const [id, html] of Object.entries(parts)) {
      if (id === "title" || shown[id] === html) continue;
      shown[id] = html;
      if (byId(id).innerHTML !== html) byId(id).innerHTML = html;
    }
  }

  // What an agent knows ends where it began; what this page saw of an earlier one stays.
  function remember(history) {
    const now = Date.now() / 1000;
    const fresh = history.ago_seconds.map((ago, at) => ({
      at: now - ago,
      into: history.in_per_second[at],
      out: history.out_per_second[at],
      waiting: history.waiting[at],
      oldest: history.oldest_seconds[at],
    }));
    const begins = fresh.length ? fresh[0].at - history.every_seconds / 2 : now;
    intervals = intervals.filter((one) => one.at < begins && one.at > now - HOUR).concat(fresh);
    every = history.every_seconds;
  }

  // ---- words ----------------------------------------------------------------------------------------------

  const clock = (date) => date.toLocaleTimeString([], { hourCycle: "h23" });

  function count(value) {
    return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
  }

  function unitOfAge(seconds) {
    if (seconds >= 172800) return [86400, "d"];
    if (seconds >= 7200) return [3600, "h"];
    return seconds >= 120 ? [60, "min"] : [1, "s"];
  }

  function age(seconds) {
    const [factor, unit] = unitOfAge(seconds);
    return `${count(seconds / factor)} ${unit}`;
  }

  // ---- drawing --------------------------------------------------------------------------------------------

  const PICTURES = [
    { id: "rates", curves: [["into", "in"], ["out", "out"]], say: count, unit: " per second", least: 1 },
    { id: "depth", curves: [["waiting", ""]], say: count, unit: "", least: 4 },
    { id: "age", curves: [["oldest", ""]], say: age, unit: "", least: 4, scale: (most) => unitOfAge(most)[0] },
  ];

  function drawAll() {
    byId("pictures").hidden = false;
    PICTURES.forEach(draw);
  }

  function add(parent, name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  // The steps that people count in: 1, 2 or 5 times a power of ten, four of them at most.
  function stepOf(most) {
    const rough = most / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    return power * [1, 2, 5, 10].find((times) => times * power >= rough * 0.999);
  }

  function draw(picture) {
    const svg = byId(picture.id).querySelector("svg");
    const { width, height } = svg.getBoundingClientRect();
    if (!width) return;
    const values = picture.curves.flatMap(([key]) => intervals.map((one) => one[key]));
    const most = Math.max(picture.least, ...values);
    const factor = picture.scale ? picture.scale(most) : 1;
    const step = stepOf(most / factor) * factor;
    const top = Math.ceil(most / step) * step;
    const now = Date.now() / 1000;
    const x = (at) => MARGIN.left + (1 - (now - at) / HOUR) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => height - MARGIN.bottom - (value / top) * (height - MARGIN.top - MARGIN.bottom);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (let value = 0; value <= top * 1.001; value += step) {
      add(svg, "line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) });
      add(svg, "text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, tick(picture, value, factor));
    }
    for (const minutes of width < NARROW ? [60, 30, 0] : [60, 45, 30, 15, 0]) {
      const anchor = minutes ? (minutes === 60 ? "start" : "middle") : "end";
      const text = minutes ? `−${minutes} min` : "now";
      add(svg, "text", { x: x(now - minutes * 60), y: height - 4, "text-anchor": anchor }, text);
    }
    for (const [key, kind] of picture.curves) drawCurve(svg, key, kind, x, y, picture.curves.length === 1);
    tellPicture(picture);
  }

  function tick(picture, value, factor) {
    return picture.scale ? `${count(value / factor)} ${unitOfAge(factor === 1 ? 0 : factor * 2)[1]}` : count(value);
  }

  // A pen that is lifted where intervals are missing: while the agent was not there.
  function drawCurve(svg, key, kind, x, y, filled) {
    const runs = [];
    let last = -Infinity;
    for (const one of intervals) {
      if (one.at - last > every * 2.5) runs.push([]);
      runs.at(-1).push(one);
      last = one.at;
    }
    for (const run of runs) {
      const points = run.map((one) => `${x(one.at).toFixed(1)},${y(one[key]).toFixed(1)}`);
      if (run.length === 1) points.unshift(`${(x(run[0].at) - 3).toFixed(1)},${y(run[0][key]).toFixed(1)}`);
      if (filled) {
        const [first, end] = [points[0], points.at(-1)].map((point) => point.split(",")[0]);
        add(svg, "path", { class: "area", d: `M${first},${y(0)}L${points.join("L")}L${end},${y(0)}Z` });
      }
      add(svg, "path", { class: `curve ${kind}`, d: `M${points.join("L")}` });
    }
  }

  // The picture in words, for who cannot see it.
  function tellPicture(picture) {
    const texts = picture.curves.map(([key, name]) => {
      const values = intervals.map((one) => one[key]);
      if (!values.length) return "";
      const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      const words = [["now", values.at(-1)], ["on average", mean], ["at most", Math.max(...values)]];
      const figures = words.map(([word, value]) => `${word} ${picture.say(value)}`).join(", ");
      const text = `${name && `${name}: `}${figures}${picture.unit}.`;
      return text[0].toUpperCase() + text.slice(1);
    });
    byId(`${picture.id}-text`).textContent = texts.join(" ").trim() || "The first interval is not over yet.";
  }

  // ---- beginning ------------------------------------------------------------------------------------------

  document.addEventListener("visibilitychange", refresh);
  addEventListener("resize", () => byId("pictures").hidden || drawAll());
  refresh();
})();
