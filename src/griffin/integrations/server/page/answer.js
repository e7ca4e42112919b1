// An answer as it streams, and the comparison of two.

import { events, request } from "./server.js";

/** The text is cut at the starts of its tokens, counted in code points: text may arrive later than its tokens. */
export class Answer {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.text = element.querySelector(".text");
    this.clear();
  }

  clear() {
    Object.assign(this, { tokens: [], points: [], laid: 0, length: 0, ended: false, served: null });
    Object.assign(this, { began: null, first: null, last: null });
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.text.replaceChildren();
    this.show();
  }

  async stream(asked, density, signal) {
    this.began = performance.now();
    this.element.classList.add("running");
    try {
      const path = asked.chat ? "v1/chat/completions" : "v1/completions";
      const response = await request(path, {
        ...asked.prompt, max_tokens: asked.length, temperature: asked.temperature, griffin: { density },
        stream: true, stream_options: { include_usage: true }, logprobs: asked.chat ? true : 0,
      }, signal);
      for await (const event of events(response)) {
        this.served = event.griffin ?? this.served;
        for (const choice of event.choices) this.take(choice);
        this.changed();
      }
      this.ended = true;
    } finally {
      this.element.classList.remove("running");
      this.changed();
    }
  }

  take(choice) {
    const found = choice.logprobs;
    for (const { token, bytes } of found?.content ?? []) {
      this.add(bytes ? bytes.join() : token, this.length);
      this.length += [...(bytes ? this.decoder.decode(new Uint8Array(bytes), { stream: true }) : token)].length;
    }
    for (const [index, token] of (found?.tokens ?? []).entries()) {
      if (!this.tokens.length) this.origin = found.text_offset[0];
      this.add(token, found.text_offset[index] - this.origin);
    }
    this.points.push(...(choice.delta?.content ?? choice.text ?? ""));
  }

  add(key, start) {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens.push({ key, start, element: this.text.appendChild(document.createElement("span")) });
  }

  show() {
    const atEnd = this.text.scrollHeight - this.text.clientHeight - this.text.scrollTop < 8;
    for (let index = this.laid; index < this.tokens.length; index++) {
      const token = this.tokens[index], next = this.tokens[index + 1];
      token.element.textContent = this.points.slice(token.start, next?.start).join("");
      if (next && next.start <= this.points.length) this.laid = index + 1;
    }
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
    const set = (name, value) => { this.element.querySelector(name).textContent = value ?? "\u2013"; };
    set(".speed", this.speed()?.toFixed(1));
    set(".count", this.began === null ? null : this.tokens.length);
    set(".first-token", this.first === null ? null : `${((this.first - this.began) / 1000).toFixed(2)} s`);
  }

  /** Tokens a second: as they arrive, and at the end the server's own figure. */
  speed() {
    if (this.served) return this.served.generation_tokens_per_s;
    return this.last > this.first ? ((this.tokens.length - 1) * 1000) / (this.last - this.first) : null;
  }
}

/** Marks the tokens of one answer that are not those of another at the same position. */
export class Comparison {
  constructor(full, griffin) {
    Object.assign(this, { full, griffin });
    this.clear();
  }

  clear() {
    Object.assign(this, { compared: 0, first: null, marked: [] });
  }

  update() {
    const { full, griffin } = this;
    for (; this.compared < griffin.tokens.length; this.compared++) {
      const other = full.tokens[this.compared], token = griffin.tokens[this.compared];
      if (!other && !full.ended) break;
      if (token.key !== other?.key) this.mark(token);
    }
    for (const { element } of this.marked) element.classList.toggle("break", /^\n+$/.test(element.textContent));
  }

  mark(token) {
    const mark = document.createElement("mark");
    mark.textContent = token.element.textContent;
    token.element.replaceWith(mark);
    token.element = mark;
    this.marked.push(token);
    this.first ??= this.compared + 1;
    mark.classList.toggle("first", this.marked.length === 1);
  }

  /** The comparison in one line. */
  line() {
    const { full, griffin, compared, first, marked } = this;
    const ended = full.ended && griffin.ended;
    if (first !== null) {
      const end = first > full.tokens.length ? ", where the full model's answer ends" : "";
      return `First differs at token ${first}${end}; ${marked.length} of ${compared} tokens differ`;
    }
    if (ended && full.tokens.length > compared) return `First differs at token ${compared + 1}, where GRIFFIN's answer ends`;
    return `Same ${compared} ${compared === 1 ? "token" : "tokens"}${ended ? "" : " so far"}`;
  }
}
