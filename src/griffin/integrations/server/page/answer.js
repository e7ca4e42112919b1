// An answer as it streams, and the comparison of two.

import { events, request } from "./server.js";

const PART = "\ufffd";  // stands for a part of a character in the text of a token

/** The text as it was sent, cut where the texts of its tokens are found in it. It may arrive later than the tokens. */
export class Answer {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.text = element.querySelector(".text");
    this.clear();
  }

  clear() {
    Object.assign(this, { tokens: [], said: "", laid: 0, cut: 0, loose: 0, closed: false, ended: false });
    Object.assign(this, { served: null, began: null, first: null, last: null });
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
      this.closed = true;
      this.element.classList.remove("running");
      this.changed();
    }
  }

  take(choice) {
    for (const { token, bytes } of choice.logprobs?.content ?? []) this.add(bytes ? bytes.join() : token, token);
    for (const token of choice.logprobs?.tokens ?? []) this.add(token, token);
    this.said += choice.delta?.content ?? choice.text ?? "";
  }

  add(key, text) {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens.push({ key, text, element: this.text.appendChild(document.createElement("span")) });
  }

  /** Gives every token whose text has arrived its part of what was said; parts of a character share what lies between. */
  lay() {
    for (; this.laid < this.tokens.length; this.laid++) {
      const { text, element } = this.tokens[this.laid];
      if (!text || text.includes(PART)) {
        this.loose += text.length;
        continue;
      }
      const start = this.find(text);
      if (start === null) break;
      if (this.loose) this.tokens[this.laid - 1].element.textContent = this.said.slice(this.cut, start);
      element.textContent = this.said.slice(this.loose ? start : this.cut, start + text.length);
      [this.cut, this.loose] = [start + text.length, 0];
    }
    if (!this.closed || this.cut >= this.said.length) return;
    this.tokens.at(-1)?.element.append(this.said.slice(this.cut));
    this.cut = this.said.length;
  }

  find(text) {
    const last = this.cut + this.loose + 1;  // a space may come before that the token alone does not show
    for (let start = this.cut; start <= last; start++) {
      if (this.said.startsWith(text, start)) return start;
    }
    return this.closed || this.said.length >= last + text.length ? this.cut : null;
  }

  show() {
    const atEnd = this.text.scrollHeight - this.text.clientHeight - this.text.scrollTop < 8;
    this.lay();
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
