// The task weights: every task's share among the neighbours, the cut of the nucleus, and sliders to set them by hand.

import { painted, label, strip } from "./colours.js";
import { element } from "./elements.js";

const shown = (value) => value.toFixed(3);

export function found({ shares, weights, nucleus }, p) {
  const tasks = Object.entries(shares).sort(([, one], [, other]) => other - one);
  const beyond = tasks.filter(([task]) => !(task in weights));
  const reached = nucleus.reduce((sum, task) => sum + shares[task], 0);
  const said = `${nucleus.length} of ${tasks.length} tasks reach ${shown(reached)}`;
  return [
    strip(tasks, `Shares of the tasks, end to end. Cut at p = ${p.toFixed(2)}: ${said}.`, p),
    element(
      "table",
      { class: "weights" },
      element("caption", {}, `Nucleus p = ${p.toFixed(2)}: ${said}`),
      element(
        "thead",
        {},
        element("tr", {}, ...["Task", "", "Share", "Weight"].map((name) => heading(name))),
      ),
      element("tbody", {}, ...tasks.filter(([task]) => task in weights).map((row) => line(row, weights, tasks[0][1]))),
      beyond.length ? element("tbody", { class: "beyond" }, ...beyond.map((row) => line(row, weights, tasks[0][1]))) : null,
    ),
  ];
}

const heading = (name) => (name ? element("th", { scope: "col" }, name) : element("td", {}));

function line([task, share], weights, largest) {
  const bar = painted(element("span", { class: "bar" }), task);
  bar.style.width = `${(100 * share) / largest}%`;
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, label(task)),
    element("td", { class: "track", "aria-hidden": "true" }, bar),
    element("td", {}, shown(share)),
    element("td", {}, task in weights ? shown(weights[task]) : "cut"),
  );
}

// `chosen` is a Map of task to weight, which the sliders change.
export function sliders(tasks, chosen) {
  const sum = element("p", { class: "hint" });
  const told = () => {
    sum.textContent = `Together ${[...chosen.values()].reduce((all, weight) => all + weight, 0).toFixed(2)}. Only tasks above 0 take part.`;
  };
  told();
  return [
    sum,
    element("div", { class: "sliders" }, ...tasks.map((task, number) => slider(task, `weight-${number}`, chosen, told))),
  ];
}

function slider(task, id, chosen, told) {
  const value = chosen.get(task) ?? 0;
  const input = element("input", { id, type: "range", min: 0, max: 1, step: 0.05, value });
  const output = element("output", { for: id, "aria-live": "off" }, value.toFixed(2));
  input.addEventListener("input", () => {
    chosen.set(task, Number(input.value));
    output.value = Number(input.value).toFixed(2);
    told();
  });
  return element("div", { class: "slider" }, element("label", { for: id }, label(task)), input, output);
}
