"use strict";

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plot")];

// Figures come without colours of paper and ink; plotly does not read CSS variables itself.
function themed() {
  const style = getComputedStyle(document.body);
  const probe = document.createElement("i");
  document.body.append(probe);
  probe.style.color = "var(--rule)";
  const rule = getComputedStyle(probe).color;
  probe.remove();
  const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: rule };
  return {
    ink: { color: style.color, family: style.fontFamily, size: 12 },
    axis,
  };
}

function layout(figure) {
  const { ink, axis } = themed();
  return {
    ...figure.layout,
    template: null,
    font: ink,
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    margin: { l: 60, r: 20, t: 20, b: 45 },
    legend: { font: { size: 11 }, ...figure.layout.legend },
    xaxis: { ...axis, ...figure.layout.xaxis },
    yaxis: { ...axis, ...figure.layout.yaxis },
  };
}

function draw() {
  for (const element of plots) {
    const figure = JSON.parse(element.dataset.figure);
    Plotly.react(element, figure.data, layout(figure), { displayModeBar: false, responsive: true });
  }
}

document.getElementById("theme").addEventListener("click", () => {
  const current = root.style.colorScheme || (dark.matches ? "dark" : "light");
  root.style.colorScheme = current === "dark" ? "light" : "dark";
  draw();
});
dark.addEventListener("change", draw);
draw();

const section = document.getElementById("gates");
if (section) {
  const domains = JSON.parse(section.dataset.domains);
  const limit = Number(section.dataset.limit);
  const choice = document.getElementById("expert");
  const tip = document.getElementById("tip");
  const tokens = [...section.querySelectorAll("[data-gates]")];
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
    const row = document.createElement("div");
    const value = document.createElement("span");
    value.textContent = (gate < 0 ? "−" : "+") + Math.abs(gate).toFixed(3);
    row.style.background = color(gate);
    row.append(name, value);
    return row;
  }

  function show(token) {
    const title = document.createElement("b");
    title.textContent = JSON.stringify(token.textContent);
    tip.replaceChildren(title, ...domains.map((name, i) => line(name, gates.get(token)[i])));
    tip.hidden = false;
    const box = token.getBoundingClientRect();
    const left = Math.min(box.left, innerWidth - tip.offsetWidth - 16);
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${scrollY + (below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight)}px`;
    section.querySelector(".active")?.classList.remove("active");
    token.classList.add("active");
  }

  function hide() {
    tip.hidden = true;
    section.querySelector(".active")?.classList.remove("active");
  }

  choice.addEventListener("change", paint);
  section.addEventListener("pointerover", (event) => {
    if (gates.has(event.target)) show(event.target);
  });
  for (const text of section.querySelectorAll(".tokens")) {
    text.addEventListener("pointerleave", hide);
    text.addEventListener("blur", hide);
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const own = [...text.children];
      const at = own.findIndex((token) => token.classList.contains("active"));
      show(own[Math.min(own.length - 1, Math.max(0, at < 0 ? 0 : at + step))]);
    });
  }
  paint();
}
