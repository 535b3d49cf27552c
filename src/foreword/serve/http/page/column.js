// One answer as it comes: a column of its own, with its numbers and its heat map.

import { Problem, ask, stream } from "./api.js";
import { draw } from "./heatmap.js";

const COLUMNS = 48; // of a heat map, at most
const SHOWN = 160; // of the prompt before its answer

export class Column {
  /** `model`: as /v1/models has it. */
  constructor(model) {
    this.model = model;
    this.element = document.getElementById("column").content.firstElementChild.cloneNode(true);
    this.element.querySelector("h2").textContent = model.id;
    this.element.classList.toggle("of-base", model.parent === null);
    this.written = this.element.querySelector(".written").appendChild(document.createTextNode(""));
  }

  /** Write an answer, then draw what it read. Resolves, whatever happens, to a problem or nothing. */
  async run(asked, signal, later) {
    const { kind, prompt, strength, ...sampling } = asked;
    const what = kind === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    this.#say(".of", this.model.parent === null ? "the base model" : `strength ${strength}`);
    if (kind === "completions") this.#say(".prompt", prompt.length > SHOWN ? `…${prompt.slice(-SHOWN)}` : prompt);
    this.#state("waiting");
    const weight = this.model.parent === null ? {} : { strength };
    let problem;
    try {
      const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
      await this.#follow(stream(path, { model: this.model.id, ...what, ...sampling, ...weight, stream: true,
                                        stream_options: { include_usage: true } }, signal));
      this.#state("ended");
    } catch (error) {
      if (error.name === "AbortError") {
        this.#state("stopped");
        this.#numbers("stopped");
      } else {
        problem = this.#fail(error);
      }
    }
    this.element.querySelector(".text").setAttribute("aria-busy", "false");
    if (problem) return problem;
    if (this.model.parent === null) this.#none("The base model reads no prefix.");
    else this.#drawn({ model: this.model.id, ...what, answer: this.written.data, strength, columns: COLUMNS }, later);
  }

  async #follow(events) {
    const began = performance.now();
    let end = null;
    this.count = 0;
    for await (const event of events) {
      const choice = event.choices[0];
      if (!choice) {
        this.count = event.usage.completion_tokens; // the server's own count, the last thing that it says
      } else {
        const text = choice.text ?? choice.delta.content ?? "";
        end = choice.finish_reason ?? end;
        if (!text) continue;
        this.#state("writing");
        this.last = performance.now();
        this.first ??= this.last;
        this.count += 1;
        this.written.appendData(text);
      }
      this.wait = this.first === undefined ? null : this.first - began;
      this.#numbers();
    }
    if (end === "length") this.#numbers("limit");
  }

  #numbers(end) {
    const seconds = (this.last - this.first) / 1000;
    const parts = [`${this.count ?? 0} ${this.count === 1 ? "token" : "tokens"}${end ? ` (${end})` : ""}`];
    if (this.count > 1 && seconds > 0) parts.push(`${speed((this.count - 1) / seconds)} tokens/s`);
    if (this.wait) parts.push(`first after ${(this.wait / 1000).toFixed(2)} s`);
    this.#say(".numbers", parts.join(" · "));
  }

  #fail(error) {
    const known = error instanceof Problem;
    if (!known) console.error(error);
    const problem = known ? error : new Problem("This page failed. Reload it; the browser’s console has the reason.");
    this.#say(".problem", problem.message).hidden = false;
    this.#state("failed");
    return problem;
  }

  /** The heat map, or why there is none. */
  async #drawn(body, signal) {
    try {
      const told = await ask("v1/foreword/shares", body, signal);
      if (told.layers.length) return draw(this.element.querySelector(".shares"), told);
      this.#none(body.strength === 0 ? "At strength 0 no attention goes to the prefix." : "This task has no virtual tokens that attention could go to.");
    } catch (error) {
      if (error.name !== "AbortError") this.#none(`No heat map: ${error.message}`);
    }
  }

  #none(why) {
    const figure = this.element.querySelector(".shares");
    figure.classList.add("none");
    figure.querySelector("figcaption").textContent = why;
    figure.querySelector(".plot").hidden = true;
    figure.hidden = false;
  }

  #state(name) {
    this.element.dataset.state = name;
  }

  #say(where, text) {
    const element = this.element.querySelector(where);
    element.textContent = text;
    return element;
  }
}

const speed = (rate) => (rate < 10 ? rate.toFixed(1) : Math.round(rate).toString());
