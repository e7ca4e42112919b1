// An answer as it streams, and the comparison of two.

import { events, request } from "./server.js";

/** The bytes of a token; one that is no whole text comes as bytes:\x20\xf0 where a string is all there is. */
function bytesOf(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return new TextEncoder().encode(token);
  return Uint8Array.from(token.split("\\x").slice(1), (digits) => parseInt(digits, 16));
}

/** The text as it was sent, cut where the texts of its tokens are found in it. It may arrive later than the tokens. */
export class Answer {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.text = element.querySelector(".text");
    this.clear();
  }

  clear() {
    Object.assign(this, { tokens: [], said: "", laid: 0, cut: 0, closed: false, ended: false });
    Object.assign(this, { served: null, began: null, first: null, last: null });
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
      this.closed = true;
      this.element.classList.remove("running");
      this.changed();
    }
  }

  take(choice) {
    for (const { token, bytes } of choice.logprobs?.content ?? []) this.add(bytes ?? bytesOf(token));
    for (const token of choice.logprobs?.tokens ?? []) this.add(bytesOf(token));
    this.said += choice.delta?.content ?? choice.text ?? "";
  }

  add(bytes) {
    this.last = performance.now();
    this.first ??= this.last;
    const text = this.decoder.decode(Uint8Array.from(bytes), { stream: true });  // a character is its last token's
    this.tokens.push({ key: bytes.join(), text, element: this.text.appendChild(document.createElement("span")) });
  }

  /** Gives every token whose text has arrived its part of what was said. */
  lay() {
    for (; this.laid < this.tokens.length; this.laid++) {
      const token = this.tokens[this.laid], end = this.end(token.text);
      if (end === null) break;
      token.element.textContent = this.said.slice(this.cut, end);
      this.cut = end;
    }
    if (!this.closed || this.cut >= this.said.length) return;
    this.tokens.at(-1)?.element.append(this.said.slice(this.cut));
    this.cut = this.said.length;
  }

  /** Where a token's text ends. Tokenizers drop a space: the first of an answer, or the one before a token alone. */
  end(text) {
    const pieces = this.laid ? [text] : [text, text.trimStart()];
    for (const start of [this.cut, this.cut + 1]) {
      const piece = pieces.find((own) => this.said.startsWith(own, start));
      if (piece !== undefined) return start + piece.length;
    }
    return this.closed || this.said.length > this.cut + text.length ? this.cut + text.length : null;
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
    if (this.tokens.length < 2) return null;
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
    if (ended && !full.tokens.length && !compared) return "Both answers are empty: the model ended them at once";
    if (first !== null) {
      const end = first > full.tokens.length ? ", where the full model's answer ends" : "";
      return `First differs at token ${first}${end}; ${marked.length} of ${compared} tokens differ`;
    }
    if (ended && full.tokens.length > compared) return `First differs at token ${compared + 1}, where GRIFFIN's answer ends`;
    return `Same ${compared} ${compared === 1 ? "token" : "tokens"}${ended ? "" : " so far"}`;
  }
}
