// A colour for every task: the same on every visit, and another one than its neighbours' while there are slots left.

import { element } from "./elements.js";

const SLOTS = 24;
const taken = new Map();

function hash(name) {
  let value = 0x811c9dc5;
  for (const character of name) value = Math.imul(value ^ character.codePointAt(0), 0x01000193);
  return value >>> 0;
}

function slotOf(task) {
  if (!taken.has(task)) {
    const used = new Set(taken.values());
    let slot = hash(task) % SLOTS;
    for (let tries = 0; tries < SLOTS && used.has(slot); tries += 1) slot = (slot + 1) % SLOTS;
    taken.set(task, slot);
  }
  return taken.get(task);
}

// Called with the whole fleet before anything is painted, so that colours do not hang on which task comes first.
export function reserve(tasks) {
  for (const task of [...tasks].sort()) slotOf(task);
}

// Sets what page.css makes the colour `--task` of.
export function painted(node, task) {
  const slot = slotOf(task);
  node.classList.add("task-colour");
  node.style.setProperty("--hue", `${(slot * 360) / SLOTS}`);
  node.style.setProperty("--tone", `${slot % 2}`);
  return node;
}

export function label(task) {
  return painted(element("span", { class: "task" }, task), task);
}

// One bar of all tasks, end to end. `shares` are pairs of task and share of the whole; what lies beyond `cut` is faint.
export function strip(shares, description, cut = null) {
  const bar = element("div", { class: "strip", role: "img", "aria-label": description });
  let reached = 0;
  for (const [task, share] of shares) {
    const piece = painted(element("span", {}), task);
    piece.style.width = `${100 * share}%`;
    // A rounding error below the cut is still within it.
    if (cut !== null && reached >= cut - 1e-9) piece.classList.add("beyond");
    reached += share;
    bar.append(piece);
  }
  if (cut !== null) {
    const mark = element("i", {});
    mark.style.left = `${100 * cut}%`;
    bar.append(mark);
  }
  return bar;
}
