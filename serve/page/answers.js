// One column for every method, each with its own stream.

import { stream } from "./api.js";
import { label, strip } from "./colours.js";
import { element, fault } from "./elements.js";

const STAGES = {
  retrieval_ms: "retrieval",
  weighing_ms: "weighing",
  queue_ms: "queue",
  first_token_ms: "first token",
  total_ms: "total",
};

export class Column {
  constructor(method) {
    this.method = method;
    this.made = element("div", { class: "made" });
    this.text = element("div", { class: "text" });
    this.figures = element("p", { class: "figures" }, "waiting");
    this.rest = element("div", { class: "rest" });
    this.answer = element("div", { "aria-live": "polite", "aria-busy": "true", "aria-atomic": "true" }, this.text);
    const name = method === "base" ? "base model" : method;
    this.node = element(
      "article",
      { "aria-label": `Answer of ${name}` },
      element("h3", {}, name),
      this.made,
      this.answer,
      this.figures,
      this.rest,
    );
  }

  // Streams one answer; resolves to whether it came whole.
  async run(settings, composition, signal) {
    const start = performance.now();
    let first = null;
    let pieces = 0;
    let usage = null;
    this.node.classList.add("streaming");
    try {
      for await (const chunk of stream(...this.request(settings, composition), signal)) {
        if (chunk.composition) this.compose(chunk.composition);
        const choice = chunk.choices?.[0];
        const text = choice?.text ?? choice?.delta?.content ?? "";
        if (text) {
          first ??= performance.now();
          pieces += 1;
          this.text.append(this.text.textContent ? text : text.trimStart());
        }
        usage = chunk.usage ?? usage;
        if (chunk.timings) this.times(chunk.timings);
        this.tell(start, first, usage?.completion_tokens ?? pieces, choice?.finish_reason);
      }
      if (first === null) {
        this.text.append(element("span", { class: "hint" }, "(no text)"));
        this.figures.textContent = "the model ended at once";
      }
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.rest.append(element("p", { class: "hint" }, "stopped"));
      else this.rest.append(fault(error.message));
      if (first === null) this.figures.textContent = "";
      return false;
    } finally {
      this.node.classList.remove("streaming");
      this.answer.setAttribute("aria-busy", "false");
    }
  }

  request({ question, chat, maxTokens, temperature }, composition) {
    const wish = this.method === "base" ? { model: "base" } : { model: "auto", composition: { method: this.method, ...composition } };
    const body = { ...wish, max_tokens: maxTokens, temperature };
    return chat
      ? ["v1/chat/completions", { ...body, messages: [{ role: "user", content: question }] }]
      : ["v1/completions", { ...body, prompt: question }];
  }

  compose({ weights }) {
    const all = Object.entries(weights);
    if (!all.length) {
      this.made.replaceChildren(element("p", { class: "hint" }, "no adapter"));
      return;
    }
    const sum = all.reduce((total, [, weight]) => total + Math.abs(weight), 0);
    const said = all.map(([task, weight]) => `${task} ${weight.toFixed(2)}`).join(", ");
    const shares = all.map(([task, weight]) => [task, Math.abs(weight) / sum]);
    const [task, weight] = all[0];
    const others = all.length > 1 ? ` and ${all.length - 1} more` : "";
    this.made.replaceChildren(
      strip(shares, `Composed of ${said}`),
      element("p", { class: "hint", title: said }, label(task), ` ${weight.toFixed(2)}${others}`),
    );
  }

  // The rate is that of the tokens behind the first one.
  tell(start, first, tokens, finish) {
    if (first === null) return;
    const seconds = (performance.now() - first) / 1000;
    const said = [`first token ${Math.round(first - start)} ms`, `${tokens} ${tokens === 1 ? "token" : "tokens"}`];
    if (tokens > 1 && seconds > 0) said.splice(1, 0, `${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    if (finish === "length") said.push("cut at the most tokens");
    this.figures.replaceChildren(...said.map((part) => element("span", {}, part)));
  }

  times(timings) {
    const rows = Object.entries(STAGES)
      .filter(([name]) => name in timings)
      .flatMap(([name, stage]) => [element("dt", {}, stage), element("dd", {}, `${timings[name].toFixed(1)} ms`)]);
    this.rest.replaceChildren(element("details", {}, element("summary", {}, "Where the time went"), element("dl", {}, ...rows)));
  }
}
