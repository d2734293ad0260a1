// The retrieval explorer. Python sends one picture per question; keys and mouse then move through it without the kernel.
// levels.js stands in front of this file.

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
    "div", {}, top, make("div", { class: "hsa-row" }, file, make("label", {}, "Where the needle stands: ", where, depth)),
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

// ---- Asking: one request at a time, then the latest

function makeAsking(model, form, say, picture) {
  let sent = null, again = false, timer = null;
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      sent = null; // may be sent again
      say(WAITING);
    }, BUSY_MS);
  };
  const ask = () => {
    again = sent !== null;
    if (again) return;
    const haystack = form.bytes();
    if (haystack === undefined) return;
    sent = Math.max(model.get("done"), Date.now());
    picture.setAttribute("aria-busy", "true");
    say("Asking.");
    wait();
    try {
      model.send({ request: sent, ...form.values() }, undefined, haystack === null ? [] : [haystack.buffer]);
    } catch {
      say(WAITING); // the kernel is gone
    }
  };
  const heard = () => {
    say(model.get("status"));
    if (sent !== null) wait();
  };
  const done = () => {
    clearTimeout(timer);
    sent = null;
    picture.setAttribute("aria-busy", "false");
    say(model.get("status"));
    if (again) ask();
  };
  return { ask, heard, done, stop: () => clearTimeout(timer) };
}

// ---- The whole

function render({ model, el }) {
  const status = make("div", { class: "hsa-status", role: "status" });
  const say = (line) => void (status.textContent = line);
  const form = makeForm(model, say);
  const tokens = make("div", { class: "hsa-tokens", role: "radiogroup", "aria-label": "Tokens of question and answer: arrow keys choose" });
  const layerMenu = make("select"), headMenu = make("select");
  const scores = make("canvas", { class: "hsa-scores", tabindex: 0, role: "slider", "aria-label": "Scores of all chunks", "aria-valuemin": 0 });
  const [readout, sum1, sum2, sum4, sum5] = Array.from({ length: 5 }, () => make("small"));
  const chunks = make("div", { role: "list", "aria-label": "Kept chunks" });
  const [blend, next] = ["The blend", "The next token"].map((name) => make("div", { role: "list", "aria-label": name }));
  const summary = make("div", { class: "hsa-summary" });
  const title = (text, line) => make("h4", {}, `${text} `, line);
  const picture = make(
    "div", {},
    title("Question and answer", make("small", {}, "Click a token, or use ← and →, to see what the model did after reading it; ↑ and ↓ change the layer.")), tokens,
    make("div", { class: "hsa-row" }, make("label", {}, "HSA ", layerMenu), make("label", {}, "Query head ", headMenu)),
    title("1 · Landmark scores of all chunks.", sum1), scores, readout,
    title("2 · The kept chunks and their weights;  3 · the attention inside each.", sum2), chunks,
    make("div", { class: "hsa-pair" }, make("div", {}, title("4 · The blend: weight × attention.", sum4), blend),
      make("div", {}, title("5 · The likeliest next tokens.", sum5), next)),
    summary,
  );
  const root = make("div", { class: "hsa", "data-lm-suppress-shortcuts": "true" }, form.root, status, picture);
  el.append(root);

  const asking = makeAsking(model, form, say, picture);
  const cards = [], selected = { token: 0, layer: 0, head: 0 };
  let shown, cursor = null, buttons = [];

  const redrawScores = () => shown && drawScores(scores, shown, selected, cursor);
  const redraw = () => {
    const { token, layer, head } = selected, { J, H } = shown, { others, kept_share, other_share } = shown.layers[layer];
    const kept = keptChunks(shown, selected), row = token * J + groupOf(shown, head);
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i === token);
      button.tabIndex = i === token ? 0 : -1;
    });
    layerMenu.value = layer;
    headMenu.value = head;
    redrawScores();
    const parts = [kept_share[row], other_share[row]];
    const nothing = "No chunk is complete before this token: there is nothing to share.";
    sum1.textContent = kept.length ? `As shares (a softmax over all chunks) they add ${sumOf(parts)}: ${parts[0].toFixed(3)} is in the kept chunks, ${parts[1].toFixed(3)} in the others.` : nothing;
    const at = cursor ?? (kept.length ? Math.floor(kept[0].chunk / shown.width) : null);
    readout.textContent = at === null ? "" : describeColumn(shown, selected, at);
    while (cards.length < kept.length) {
      const card = makeChunk();
      for (const event of ["pointerenter", "focus"]) card.root.addEventListener(event, () => point(Math.floor(card.chunk / shown.width)));
      chunks.append(cards[cards.push(card) - 1].root);
    }
    cards.forEach((card, i) => (i < kept.length ? showChunk(card, shown, kept[i]) : (card.root.hidden = true)));
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
    summary.textContent = shown.summaries[token][layer];
  };
  const select = (change, focus = false) => {
    Object.assign(selected, change);
    redraw();
    if (focus) buttons[selected.token].focus();
  };
  const reload = () => {
    shown = read(model.get("data"));
    Object.assign(selected, { token: shown.asked - 1, layer: shown.layers.length - 1, head: 0 });
    cursor = null;
    buttons = shown.tokens.map((text, i) => {
      const mark = i < shown.asked ? null : shown.marks[i - shown.asked];
      const kind = mark === null ? "" : mark ? "right" : "wrong";
      const place = i < shown.asked ? `token ${i + 1} of the question` : `token ${i - shown.asked + 1} of the answer`;
      const button = make("button", { type: "button", role: "radio", class: `hsa-token ${kind}`, "aria-label": `${place}: ${text}${kind && `, ${kind}`}` }, visible(text));
      button.addEventListener("click", () => select({ token: i }));
      return button;
    });
    const verdict = make("strong", {}, shown.correct === null ? "" : shown.correct ? "✓ right" : "✗ wrong");
    tokens.replaceChildren(...buttons.slice(0, shown.asked), make("span", {}, " answer → "), ...buttons.slice(shown.asked), verdict);
    layerMenu.replaceChildren(...shown.layers.map((_, i) => make("option", { value: i }, `layer ${i}`)));
    const { H, J } = shown;
    const means = Array.from({ length: J }, (_, j) => (J === 1 ? `mean of ${H}` : `mean of ${(j * H) / J + 1} to ${((j + 1) * H) / J}`));
    headMenu.replaceChildren(...[...means, ...Array.from({ length: H }, (_, h) => `${h + 1}`)].map((name, i) => make("option", { value: i }, name)));
    scores.setAttribute("aria-valuemax", Math.max(shown.C - 1, 0));
    redraw();
  };
  const point = (column) => {
    if (!shown.C) return;
    cursor = Math.min(Math.max(column, 0), shown.C - 1);
    readout.textContent = describeColumn(shown, selected, cursor);
    scores.setAttribute("aria-valuenow", cursor);
    scores.setAttribute("aria-valuetext", readout.textContent);
    redrawScores();
  };
  const keys = (moves) => (event) => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    move();
  };
  const step = (n) => () => select({ token: Math.min(Math.max(selected.token + n, 0), shown.T - 1) }, true);
  const turn = (n) => () => select({ layer: Math.min(Math.max(selected.layer + n, 0), shown.layers.length - 1) });
  tokens.addEventListener("keydown", keys({
    ArrowRight: step(1), ArrowLeft: step(-1), Home: step(-Infinity), End: step(Infinity), ArrowUp: turn(-1), ArrowDown: turn(1),
  }));
  const slide = (n) => () => point((cursor ?? 0) + n);
  scores.addEventListener("keydown", keys({
    ArrowRight: slide(1), ArrowUp: slide(1), ArrowLeft: slide(-1), ArrowDown: slide(-1), Home: slide(-Infinity), End: slide(Infinity),
    PageUp: slide(64), PageDown: slide(-64),
  }));
  const place = (event) => {
    const box = scores.getBoundingClientRect();
    return [Math.floor(((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * shown.C), Math.floor((event.clientY - box.top) / ROW)];
  };
  scores.addEventListener("pointermove", (event) => point(place(event)[0]));
  scores.addEventListener("click", (event) => select({ layer: Math.min(Math.max(place(event)[1], 0), shown.layers.length - 1) }));
  layerMenu.addEventListener("change", () => select({ layer: Number(layerMenu.value) }));
  headMenu.addEventListener("change", () => select({ head: Number(headMenu.value) }));
  form.button.addEventListener("click", asking.ask);
  for (const area of form.areas) area.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && asking.ask());
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.activeElement.blur();
    event.stopPropagation();
  });

  const listeners = { "change:data": reload, "change:form": form.fill, "change:status": asking.heard, "change:done": asking.done };
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  const themed = new MutationObserver(() => requestAnimationFrame(redrawScores));
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light"] });
  const resized = new ResizeObserver(redrawScores);
  form.fill();
  say(model.get("status"));
  reload();
  resized.observe(scores);
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    themed.disconnect();
    resized.disconnect();
    asking.stop();
  };
}

export default { render };
