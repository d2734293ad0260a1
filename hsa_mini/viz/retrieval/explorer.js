// The retrieval explorer. Python sends one picture per question; keys and mouse then move through it without the kernel.
// The other files stand in front of this one, in the same module (anywidget loads one).

const BUSY_MS = 3000;
const LAST = "The picture shows the last question.";
const WAITING = `The kernel is busy or has stopped; the question waits for it. ${LAST}`;

// ---- The fields

function makeForm(model, say) {
  const haystack = make("textarea", { rows: 4 }), file = make("input", { type: "file", "aria-label": "Haystack from a text file" });
  const needle = make("textarea", { rows: 1 }), question = make("textarea", { rows: 1 });
  const depth = make("input", { type: "range", min: 0, max: 1, step: 0.01, "data-lm-suppress-shortcuts": "true" });
  const button = make("button", { type: "button" }, "Ask");
  const where = make("span");
  const fields = [["Haystack (or a file)", haystack], ["Needle sentence", needle], ["Question", question]];
  const [top, middle, bottom] = fields.map(([name, field]) => make("label", {}, name, field));
  const root = make(
    "div", { class: "hsa-asks" }, top, make("div", { class: "hsa-row" }, file, make("label", {}, "Where the needle stands: ", where, depth)),
    make("div", { class: "hsa-row" }, middle, bottom, button),
  );
  let text = null; // a file, which the text area does not show
  let filled, last; // the haystack as Python has it, and all that was last asked
  const depthShown = () => (where.textContent = `${Math.round(100 * depth.value)} %`);
  const written = () => ({ haystack: haystack.value, needle: needle.value, question: question.value, depth: depth.value, text });
  // What was edited while a question was on its way stays.
  const fill = () => {
    const form = model.get("form"), now = written();
    const same = (...names) => names.every((name) => !last || now[name] === last[name]);
    if (same("needle")) needle.value = form.needle;
    if (same("question")) question.value = form.question;
    if (same("depth")) depth.value = form.depth;
    if (same("haystack", "text")) {
      haystack.value = form.haystack ?? "";
      haystack.placeholder = form.haystack === null ? `${count(form.characters)} characters, too many to show. Type here to replace them.` : "";
      [text, filled] = [null, haystack.value];
    }
    depthShown();
  };
  const refuse = (size) => say(`haystack: got ${count(size)} bytes, accepted are at most ${count(model.get("form").max_bytes)}. ${LAST}`);
  // The haystack as bytes; null if it is still the one that Python has; undefined if it is too long.
  const bytes = () => {
    last = written();
    if (text === null && haystack.value === filled) return null;
    const encoded = new TextEncoder().encode(text ?? haystack.value);
    return encoded.length > model.get("form").max_bytes ? refuse(encoded.length) : encoded;
  };
  haystack.addEventListener("input", () => (text = null));
  depth.addEventListener("input", depthShown);
  file.addEventListener("change", async () => {
    const [chosen] = file.files;
    if (!chosen) return;
    if (chosen.size > model.get("form").max_bytes) return refuse(chosen.size);
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await chosen.arrayBuffer());
    } catch {
      return say(`haystack: the file is not UTF-8 text, accepted is one that is. ${LAST}`);
    }
    haystack.value = "";
    haystack.placeholder = `${chosen.name}: ${count(text.length)} characters. Type here to replace them.`;
    say("The file is read. Ask to search it.");
  });
  return { root, fill, button, bytes, areas: [haystack, needle, question], values: () => ({ needle: needle.value, question: question.value, depth: Number(depth.value) }) };
}

// ---- Requests: one at a time, then the latest. compose() returns content and buffers, or nothing if there is nothing to send.

let lastRequest = 0;

function makeRequests(model, compose, say, setBusy) {
  let sent = null, flying = false, again = false, timer = null;
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      flying = false; // may be sent again
      say(WAITING);
    }, BUSY_MS);
  };
  const ask = () => {
    again = flying;
    if (again) return;
    const message = compose();
    if (!message) return;
    flying = true;
    sent = lastRequest = Math.max(lastRequest + 1, Date.now());
    setBusy(true);
    wait();
    try {
      model.send({ request: sent, ...message.content }, undefined, message.buffers);
    } catch {
      say(WAITING); // the kernel is gone
    }
  };
  const done = () => {
    if (model.get("done") !== sent) return;
    clearTimeout(timer);
    flying = false;
    setBusy(false);
    if (again) ask();
  };
  return { ask, done, heard: () => flying && wait(), stop: () => clearTimeout(timer) };
}

// ---- The whole

function render({ model, el }) {
  const status = make("div", { class: "hsa-status", role: "status" });
  const say = (line) => void (status.textContent = line);
  const form = makeForm(model, say);
  const tokens = make("div", { class: "hsa-tokens", role: "radiogroup", "aria-label": "Tokens of question and answer: arrow keys choose" });
  const layerMenu = make("select"), headMenu = make("select"), modelMenu = make("select");
  const modelLabel = make("label", {}, "Model ", modelMenu);
  modelMenu.append(...["first", "second"].map((name) => make("option", { value: name }, name)));
  const [sum1, sum2, sum4, sum5] = Array.from({ length: 4 }, () => make("small"));
  const chunks = make("div", { role: "list", "aria-label": "Kept chunks" });
  const [blend, next] = ["The blend", "The next token"].map((name) => make("div", { role: "list", "aria-label": name }));
  const summary = make("div", { class: "hsa-summary" });
  const title = (text, line) => make("h4", {}, `${text} `, line);
  const whatIf = makeWhatIf(model, () => shown, () => modelMenu.selectedIndex, () => redraw());
  const comparison = makeCompare(() => keep(shown, modelLabel.hidden ? "" : `${modelMenu.value} model`, selected), () => redraw());
  const selected = { token: 0, layer: 0, head: 0 };
  // The answer as it is written: after a number of its tokens, the model has read the last of them.
  const written = () => selected.token - shown.asked + 1;
  const player = makePlayer({
    name: "answer token", last: () => shown.T - shown.asked, get: () => Math.max(written(), 0), seconds: 1,
    set: (number) => select({ token: shown.asked - 1 + number }),
  });
  const zoom = makeZoom(model, selected, () => shown, comparison.kept, () => modelMenu.selectedIndex, (change) => select(change));
  const picture = make(
    "div", {},
    title("Question and answer", make("small", {}, "Click a token, or use ← and →, to see what the model did after reading it; ↑ and ↓ change the layer. Play to see the answer written.")), tokens, player.root,
    make("div", { class: "hsa-row" }, modelLabel, make("label", {}, "HSA ", layerMenu), make("label", {}, "Query head ", headMenu)),
    make("div", { class: "hsa-asks" }, title("What if?", make("small", {}, "The model reads the question anew, with your changes.")), whatIf.root),
    title("Compare", make("small", {}, "Keep one token, layer, head or model, then select another.")), comparison.root,
    title("1 · Landmark scores of all chunks.", sum1), ...zoom.parts,
    title("2 · The kept chunks and their weights;  3 · the attention inside each.", sum2), chunks,
    make("div", { class: "hsa-pair" }, make("div", {}, title("4 · The blend: weight × attention.", sum4), blend),
      make("div", {}, title("5 · The likeliest next tokens.", sum5), next)),
    summary,
  );
  const saved = model.get("saved"); // in a page without a kernel: what needs the model is hidden
  const told = make("div");
  const root = make("div", { class: saved ? "hsa saved" : "hsa", "data-lm-suppress-shortcuts": "true" }, form.root, told, status, picture);
  el.append(root);

  const asked = () => {
    const haystack = form.bytes();
    if (haystack === undefined) return;
    say("Asking.");
    return { content: form.values(), buffers: haystack === null ? [] : [haystack.buffer] };
  };
  const asking = makeRequests(model, asked, say, (busy) => picture.setAttribute("aria-busy", busy));
  const cards = [];
  let shown, buttons = [];

  const redraw = () => {
    const { token, layer, head } = selected, { J, H } = shown, { others, kept_share, other_share } = shown.layers[layer];
    const kept = keptChunks(shown, selected), row = token * J + groupOf(shown, head);
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i === token);
      button.tabIndex = i === token ? 0 : -1;
    });
    player.redraw();
    tokens.classList.toggle("playing", player.playing());
    layerMenu.value = layer;
    headMenu.value = head;
    zoom.redraw();
    const parts = [kept_share[row], other_share[row]];
    const nothing = "No chunk is complete before this token: there is nothing to share.";
    sum1.textContent = kept.length ? `As shares (a softmax over all chunks) they add ${sumOf(parts)}: ${parts[0].toFixed(3)} is in the kept chunks, ${parts[1].toFixed(3)} in the others.` : nothing;
    while (cards.length < kept.length) {
      const card = makeChunk();
      card.controls = whatIf.controls(card);
      card.root.firstChild.append(card.controls.root);
      for (const event of ["pointerenter", "focus"]) card.root.addEventListener(event, () => zoom.point(card.chunk));
      chunks.append(cards[cards.push(card) - 1].root);
    }
    cards.forEach((card, i) => {
      card.root.hidden = i >= kept.length;
      if (card.root.hidden) return;
      showChunk(card, shown, kept[i]);
      card.controls.update(kept[i]);
    });
    const more = others[row] > 0 ? ` (chunks not shown: ${others[row].toFixed(3)})` : "";
    const weights = [...kept.map(({ weight }) => weight), others[row]];
    const heads = head < J ? `the mean of ${H / J} heads` : `head ${head - J + 1}`;
    sum2.textContent = kept.length ? `The weights add ${sumOf(weights)}${more}, and so does the attention in each chunk (${sumOf(kept[0].attention)}). Strips: a row per head, the chunk's tokens from left to right. Words: ${heads}.` : nothing;
    const rows = kept.length ? blendRows(shown, kept) : [];
    if (others[row] > 0) rows.push({ name: "chunks not shown", share: others[row] });
    showShares(blend, rows);
    sum4.textContent = kept.length ? `It adds ${sumOf(rows.map(({ share }) => share))}.` : "HSA adds 0.";
    const followed = shown.tokens[token + 1];
    const five = shown.next.words[token].map((name, i) => ({ name, share: shown.next.shares[5 * token + i], followed: name === followed }));
    five.push({ name: "all others", share: shown.next.others[token] });
    showShares(next, five);
    sum5.textContent = `They add ${sumOf(five.map(({ share }) => share))}; underlined is what followed.`;
    comparison.redraw();
    summary.textContent = shown.summaries[token][layer];
  };
  const select = (change, focus = false) => {
    Object.assign(selected, change);
    redraw();
    if (focus) buttons[selected.token].focus();
  };
  const answered = () => {
    const { needle, question } = model.get("form");
    if (saved) told.replaceChildren(make("strong", {}, "Needle: "), needle, make("br"), make("strong", {}, "Question: "), question);
    comparison.end();
    modelLabel.hidden = !model.get("second").shape;
    modelMenu.selectedIndex = 0;
    reload();
  };
  const reload = () => {
    player.end();
    shown = read(model.get(modelMenu.selectedIndex ? "second" : "data"));
    Object.assign(selected, { token: shown.asked - 1, layer: shown.layers.length - 1, head: 0 });
    whatIf.reload();
    buttons = shown.tokens.map((text, i) => {
      const mark = i < shown.asked ? null : shown.marks[i - shown.asked];
      const kind = mark === null ? "" : mark ? "right" : "wrong";
      const button = make("button", { type: "button", role: "radio", class: `hsa-token ${kind}`, "aria-label": `${placeOf(shown, i)}: ${text}${kind && `, ${kind}`}` }, visible(text));
      button.addEventListener("click", () => select({ token: i }));
      return button;
    });
    const verdict = make("strong", {}, shown.correct === null ? "" : shown.correct ? "✓ right" : "✗ wrong");
    tokens.replaceChildren(...buttons.slice(0, shown.asked), make("span", {}, " answer → "), ...buttons.slice(shown.asked), verdict);
    layerMenu.replaceChildren(...shown.layers.map((_, i) => make("option", { value: i }, `layer ${i}`)));
    const { H, J } = shown;
    const means = Array.from({ length: J }, (_, j) => (J === 1 ? `mean of ${H}` : `mean of ${(j * H) / J + 1} to ${((j + 1) * H) / J}`));
    headMenu.replaceChildren(...[...means, ...Array.from({ length: H }, (_, h) => `${h + 1}`)].map((name, i) => make("option", { value: i }, name)));
    zoom.reload();
    redraw();
  };
  const step = (n) => () => select({ token: Math.min(Math.max(selected.token + n, 0), shown.T - 1) }, true);
  const turn = (n) => () => select({ layer: Math.min(Math.max(selected.layer + n, 0), shown.layers.length - 1) });
  tokens.addEventListener("keydown", keys({
    ArrowRight: step(1), ArrowLeft: step(-1), Home: step(-Infinity), End: step(Infinity), ArrowUp: turn(-1), ArrowDown: turn(1),
  }));
  layerMenu.addEventListener("change", () => select({ layer: Number(layerMenu.value) }));
  modelMenu.addEventListener("change", reload);
  headMenu.addEventListener("change", () => select({ head: Number(headMenu.value) }));
  form.button.addEventListener("click", asking.ask);
  for (const area of form.areas) area.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && asking.ask());
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.activeElement.blur();
    event.stopPropagation();
  });

  const heard = () => {
    say(model.get("status"));
    asking.heard();
  };
  const done = () => {
    asking.done();
    whatIf.requests.done();
    zoom.requests.done();
  };
  const listeners = { "change:data": answered, "change:form": form.fill, "change:status": heard, "change:done": done, "change:effect": whatIf.effect, "change:opened": zoom.opened };
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  const themed = new MutationObserver(() => requestAnimationFrame(zoom.draw));
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light"] });
  const resized = new ResizeObserver(zoom.draw);
  form.fill();
  say(model.get("status"));
  answered();
  resized.observe(zoom.canvas);
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    player.end();
    themed.disconnect();
    resized.disconnect();
    asking.stop();
    whatIf.requests.stop();
    zoom.requests.stop();
  };
}

export default { render };
