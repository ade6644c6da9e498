"use strict";

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const data = JSON.parse(document.getElementById("data").textContent);
const small = matchMedia("(max-width: 640px)");

// ---- plots: figures come without colours of paper and ink; plotly reads no CSS variables itself.

function themed() {
  const style = getComputedStyle(document.body);
  const probe = document.createElement("i");
  document.body.append(probe);
  probe.style.color = "var(--rule)";
  const rule = getComputedStyle(probe).color;
  probe.style.color = "var(--raised)";
  const raised = getComputedStyle(probe).color;
  probe.remove();
  return {
    ink: { color: style.color, family: style.fontFamily, size: small.matches ? 11 : 12 },
    axis: { gridcolor: rule, zerolinecolor: style.color, linecolor: rule },
    raised,
    rule,
  };
}

function layout(figure) {
  const { ink, axis, raised, rule } = themed();
  return {
    ...figure.layout,
    template: null,
    font: ink,
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    margin: { l: small.matches ? 45 : 60, r: 20, t: 20, b: 55 },
    hoverlabel: { bgcolor: raised, bordercolor: rule, font: { color: ink.color } },
    legend: { font: { size: 11 }, ...figure.layout.legend },
    xaxis: { ...axis, ...figure.layout.xaxis, title: { ...figure.layout.xaxis?.title, standoff: 8 } },
    yaxis: { ...axis, ...figure.layout.yaxis, tickfont: { size: small.matches ? 9 : 11 } },
  };
}

const visible = (element) => element.checkVisibility();

// A plot in a hidden part has no size: it is drawn when it is first seen, and again in other colours.
function draw(again) {
  for (const element of document.querySelectorAll(".plot")) {
    if (!visible(element) || (element.dataset.drawn && !again)) continue;
    const figure = data.figures[element.dataset.figure];
    Plotly.react(element, figure.data, layout(figure), { displayModeBar: false, responsive: true });
    element.dataset.drawn = "yes";
  }
  if (again) {
    for (const element of document.querySelectorAll(".plot[data-drawn]")) {
      if (!visible(element)) delete element.dataset.drawn;
    }
  }
}

for (const details of document.querySelectorAll("details:has(.plot)")) {
  details.addEventListener("toggle", () => draw());
}
document.getElementById("theme").addEventListener("click", () => {
  const current = root.style.colorScheme || (dark.matches ? "dark" : "light");
  root.style.colorScheme = current === "dark" ? "light" : "dark";
  draw(true);
});
dark.addEventListener("change", () => draw(true));

// ---- tabs

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab, focus) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  const strip = tab.parentElement;
  strip.scrollLeft = tab.offsetLeft - (strip.clientWidth - tab.offsetWidth) / 2;
  draw();
}

const named = (hash) => tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === hash);

function open(tab, focus) {
  select(tab, focus);
  scrollTo(0, 0);
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
}

for (const tab of tabs) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(tab);
    const next = {
      ArrowRight: (at + 1) % tabs.length,
      ArrowLeft: (at + tabs.length - 1) % tabs.length,
      Home: 0,
      End: tabs.length - 1,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    open(tabs[next], true);
  });
}
for (const link of document.querySelectorAll("main a[href^='#']")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    open(named(link.hash), true);
  });
}
addEventListener("hashchange", () => select(named(location.hash) ?? tabs[0]));

// ---- a select that shows one part of several

for (const choice of document.querySelectorAll("[data-shows]")) {
  const parts = document.querySelectorAll(`[data-group="${choice.dataset.shows}"]`);
  const show = () => {
    for (const part of parts) part.hidden = part.dataset.option !== choice.value;
    draw();
  };
  choice.addEventListener("change", show);
  show();
}

// ---- answers side by side

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function chips(prompt, answer) {
  const line = make("p", "chips");
  const chip = (text, tone = "") => line.append(make("span", `chip ${tone}`, text));
  if (answer.safe === false) chip("judged unsafe", "bad");
  else if (answer.informative_safe) chip("informative and safe", "good");
  else chip("safe");
  if (answer.refusal) chip("refusal");
  if (!prompt.harmful) chip("harmless prompt");
  if (prompt.refusal_only) chip("judged by refusal alone");
  if (answer.on_topic === false) chip("off topic");
  if (answer.degenerate) chip("degenerate");
  for (const [name, said] of Object.entries(answer.others)) {
    if (said.safe === false) chip(`${name}: unsafe`);
    if (said.refusal) chip(`${name}: refusal`);
  }
  if (!answer.finished) chip("cut by length");
  if (answer.harm !== null) {
    const harm = make("span", "faint", `harm ${answer.harm.toFixed(2)}`);
    harm.title = "probability of harm that the judge gave";
    line.append(harm);
  }
  return line;
}

function article(prompt, answer) {
  const card = make("article", answer.system === "safemoe" ? "ours" : "");
  card.append(make("h4", "", data.systems[answer.system] ?? answer.system), chips(prompt, answer));
  card.append(make("p", answer.hidden ? "answer hidden" : "answer", answer.text));
  if (answer.hidden) card.append(make("p", "hash", `sha256 ${answer.sha256}`));
  return card;
}

function mark(answer) {
  const kind = answer.safe === false ? "bad" : answer.informative_safe ? "good" : "";
  const said = { bad: "judged unsafe", good: "informative and safe", "": "safe" }[kind];
  const dot = make("i", `mark ${kind}`);
  dot.title = `${data.systems[answer.system] ?? answer.system}: ${said}`;
  return dot;
}

function entry(prompt, systems, opened) {
  const shown = prompt.answers.filter((answer) => systems.has(answer.system));
  const details = make("details");
  const summary = make("summary");
  const marks = make("span", "marks");
  marks.append(...shown.map(mark));
  const place = make("span", "domain", prompt.domain.replaceAll("_", " "));
  const benchmark = data.benchmarks[prompt.benchmark] ?? prompt.benchmark.replaceAll("_", " ");
  if (benchmark !== prompt.domain) place.append(make("small", "", benchmark));
  summary.append(place, make("span", "prompt", prompt.prompt), marks);
  details.append(summary);
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const side = make("div", "side");
    side.append(...shown.map((answer) => article(prompt, answer)));
    details.append(side);
  });
  details.open = opened;
  return details;
}

const OUTCOMES = {
  "": () => true,
  unsafe: ({ ours }) => ours && ours.safe === false,
  refusal: ({ ours }) => ours?.refusal,
  better: ({ ours, base }) => ours?.informative_safe && base && !base.informative_safe,
  worse: ({ ours, base }) => base?.informative_safe && ours && !ours.informative_safe,
  judges: ({ answers }) =>
    answers.some(({ safe, others }) =>
      Object.values(others).some((said) => said.safe !== null && said.safe !== safe),
    ),
};

function filters(form) {
  const list = document.getElementById("list");
  const more = document.getElementById("more");
  const page = 25;
  let limit = page;

  function show() {
    const chosen = new FormData(form);
    const systems = new Set(chosen.getAll("system"));
    const words = chosen.get("words").toLowerCase().split(/\s+/).filter(Boolean);
    const found = data.answers.filter((prompt) => {
      const by = (name) => prompt.answers.find((answer) => answer.system === name);
      const texts = prompt.answers.filter(({ system }) => systems.has(system)).map(({ text }) => text);
      const text = [prompt.prompt, ...texts].join("\n").toLowerCase();
      return (
        (!chosen.get("benchmark") || chosen.get("benchmark") === prompt.benchmark) &&
        (!chosen.get("domain") || chosen.get("domain") === prompt.domain) &&
        OUTCOMES[chosen.get("outcome")]({ ours: by("safemoe"), base: by("base"), answers: prompt.answers }) &&
        words.every((word) => text.includes(word))
      );
    });
    list.replaceChildren(...found.slice(0, limit).map((prompt, i) => entry(prompt, systems, i === 0)));
    const count = `${found.length} of ${data.answers.length} prompts`;
    document.getElementById("found").textContent = found.length ? count : `${count}: nothing fits`;
    more.hidden = found.length <= limit;
  }

  form.addEventListener("input", () => {
    limit = page;
    show();
  });
  more.addEventListener("click", () => {
    limit += page;
    show();
  });
  show();
}

// ---- gates over text

function gatesOverText(texts) {
  const { limit, domains } = data.gates;
  const choice = document.getElementById("expert");
  const tip = document.getElementById("tip");
  const tokens = [...texts.querySelectorAll("[data-gates]")];
  const gates = new Map(tokens.map((token) => [token, token.dataset.gates.split(" ").map(Number)]));

  const strongest = (values) => values.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);

  function color(gate) {
    const alpha = 0.75 * Math.min(1, Math.abs(gate) / limit);
    return gate < 0 ? `rgb(0 114 178 / ${alpha})` : `rgb(213 94 0 / ${alpha})`;
  }

  function paint() {
    const expert = Number(choice.value);
    for (const token of tokens) {
      const values = gates.get(token);
      token.style.backgroundColor = color(expert < 0 ? strongest(values) : values[expert]);
    }
  }

  function line(name, gate) {
    const row = make("div");
    row.style.background = color(gate);
    row.append(make("span", "", name.replaceAll("_", " ")));
    row.append(make("span", "", (gate < 0 ? "−" : "+") + Math.abs(gate).toFixed(3)));
    return row;
  }

  function show(token) {
    const title = make("b", "", JSON.stringify(token.textContent));
    tip.replaceChildren(title, ...domains.map((name, i) => line(name, gates.get(token)[i])));
    tip.hidden = false;
    const box = token.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 16));
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${scrollY + (below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight)}px`;
    texts.querySelector(".active")?.classList.remove("active");
    token.classList.add("active");
  }

  function hide() {
    tip.hidden = true;
    texts.querySelector(".active")?.classList.remove("active");
  }

  choice.addEventListener("change", paint);
  texts.addEventListener("pointerover", (event) => {
    if (gates.has(event.target)) show(event.target);
  });
  for (const text of texts.querySelectorAll(".tokens")) {
    text.addEventListener("pointerleave", hide);
    text.addEventListener("blur", hide);
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step || !text.children.length) return;
      event.preventDefault();
      const own = [...text.children];
      const at = own.findIndex((token) => token.classList.contains("active"));
      show(own[Math.min(own.length - 1, Math.max(0, at < 0 ? 0 : at + step))]);
    });
  }
  paint();
}

const form = document.getElementById("filters");
if (form) filters(form);
const texts = document.getElementById("texts");
if (texts) gatesOverText(texts);
select(named(location.hash) ?? tabs[0]);
