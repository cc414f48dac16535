// The task weights: every task's share among the neighbours, what the weigher made of them, and sliders to set them by hand.

import { painted, label, strip } from "./colours.js";
import { element } from "./elements.js";

const shown = (value) => value.toFixed(3);

const bySize = ([, one], [, other]) => other - one;

// Of the nucleus, which is a cut through the shares, these are drawn; of other weighers the weights.
export function found({ shares, weights, nucleus, weigher }, p) {
  const tasks = Object.entries(shares).sort(bySize);
  if (weigher === "nucleus") {
    const reached = nucleus.reduce((sum, task) => sum + shares[task], 0);
    const said = `${nucleus.length} of ${tasks.length} tasks reach ${shown(reached)}`;
    const drawn = strip(tasks, `Shares of the tasks, end to end. Cut at p = ${p.toFixed(2)}: ${said}.`, p);
    return [drawn, table(`Nucleus p = ${p.toFixed(2)}: ${said}`, tasks, shares, weights, shares)];
  }
  const weighed = Object.entries(weights).sort(bySize);
  const all = [...weighed, ...tasks.filter(([task]) => !(task in weights))];
  const said = `Weighed by ${weigher}: ${weighed.length} of ${all.length} tasks take part`;
  const drawn = strip(weighed.filter(([, weight]) => weight > 0), `Weights of the tasks, end to end. ${said}.`);
  return [drawn, table(said, all, shares, weights, weights)];
}

// `drawn` is what the bars show, by task.
function table(caption, tasks, shares, weights, drawn) {
  const largest = Math.max(...Object.values(drawn));
  const lines = (rows) => rows.map(([task]) => line(task, shares[task] ?? 0, weights[task], (drawn[task] ?? 0) / largest));
  const beyond = tasks.filter(([task]) => !(task in weights));
  return element(
    "table",
    { class: "weights" },
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...["Task", "", "Share", "Weight"].map((name) => heading(name)))),
    element("tbody", {}, ...lines(tasks.filter(([task]) => task in weights))),
    beyond.length ? element("tbody", { class: "beyond" }, ...lines(beyond)) : null,
  );
}

const heading = (name) => (name ? element("th", { scope: "col" }, name) : element("td", {}));

function line(task, share, weight, length) {
  const bar = painted(element("span", { class: "bar" }), task);
  bar.style.width = `${100 * Math.max(0, length)}%`;
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, label(task)),
    element("td", { class: "track", "aria-hidden": "true" }, bar),
    element("td", {}, shown(share)),
    element("td", {}, weight === undefined ? "cut" : shown(weight)),
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
