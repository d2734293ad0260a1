// The levels of the retrieval explorer: what is drawn for the selected token, layer and head. explorer.js follows it in the
// same module (anywidget loads one). Every text is set as textContent, so markup in it stays text.
// Dimensions: T tokens, H query heads, J key/value heads, C columns of chunks, K kept chunks shown, S tokens of a chunk.

const ROW = 74, LEFT = 56, RIGHT = 12, AXIS = 22; // of the score canvas, in pixels
const WORDS = 8; // of the blend
const HEAT = 10; // shades of attention

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const numbers = (view, Kind = Float32Array) => new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const count = (n) => n.toLocaleString("en");
const visible = (word) => (word.trim() ? word : word.replaceAll(" ", "␣") || "·"); // a token of spaces, or part of a character
const total = (values) => values.reduce((a, b) => a + b, 0);
const sumOf = (values) => `up to ${total(values).toFixed(3)}`;

function read(data) {
  const [T, H, J, C, K, S] = data.shape;
  const layers = data.layers.map((layer) => ({
    indices: numbers(layer.indices, Int32Array),
    ...Object.fromEntries(
      ["scores", "weights", "others", "attention", "kept_share", "other_share"].map((name) => [name, numbers(layer[name])]),
    ),
  }));
  const next = { words: data.next.words, shares: numbers(data.next.shares), others: numbers(data.next.others) };
  return { ...data, T, H, J, C, K, S, layers, next, asked: T - data.answer_tokens };
}

// What is selected: head < J is the mean over the query heads of a key/value head, the others follow.
const groupOf = ({ H, J }, head) => (head < J ? head : Math.floor(((head - J) * J) / H));
function headsOf({ H, J }, head) {
  return head >= J ? [head - J] : Array.from({ length: H / J }, (_, i) => (head * H) / J + i);
}

// The kept chunks of one token in one layer: { chunk, weight, attention [S], byHead [H/J][S] }, the heaviest first.
function keptChunks(picture, { token, layer, head }) {
  const { H, J, K, S } = picture;
  const { indices, weights, attention } = picture.layers[layer];
  const group = groupOf(picture, head);
  const row = (h, k) => attention.subarray(((token * H + h) * K + k) * S, ((token * H + h) * K + k + 1) * S);
  const kept = [];
  for (let k = 0; k < K; k++) {
    const slot = (token * J + group) * K + k;
    if (indices[slot] < 0) continue;
    const chosen = headsOf(picture, head).map((h) => row(h, k));
    const mean = Array.from({ length: S }, (_, s) => total(chosen.map((shares) => shares[s])) / chosen.length);
    const byHead = headsOf(picture, group).map((h) => row(h, k));
    kept.push({ chunk: indices[slot], weight: weights[slot], attention: mean, byHead });
  }
  return kept;
}

function holdsNeedle({ needle, chunk_size: S }, chunk) {
  return chunk * S < needle[1] && needle[0] < (chunk + 1) * S;
}

// ---- The scores of all chunks, one row per layer

function drawScores(canvas, picture, { token, layer, head }, cursor) {
  const { J, C, layers, chunks, width } = picture;
  const style = getComputedStyle(canvas), ratio = window.devicePixelRatio || 1;
  const [ink, soft, line, blue, red] = ["--ink", "--soft", "--line", "--kept", "--wrong"].map((name) => style.getPropertyValue(name));
  const wide = Math.max(canvas.clientWidth, 240), high = ROW * layers.length + AXIS;
  canvas.style.height = `${high}px`;
  canvas.width = wide * ratio;
  canvas.height = high * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px sans-serif";
  const span = wide - LEFT - RIGHT, group = groupOf(picture, head);
  const across = (column) => LEFT + ((column + 0.5) / Math.max(C, 1)) * span;
  layers.forEach(({ scores, indices }, i) => {
    const row = scores.subarray((token * J + group) * C, (token * J + group + 1) * C);
    const seen = row.filter(Number.isFinite);
    const low = seen.reduce((a, b) => Math.min(a, b), Infinity), best = seen.reduce((a, b) => Math.max(a, b), -Infinity);
    const top = i * ROW + 12, down = (score) => top + (1 - (score - low) / (best - low || 1)) * (ROW - 26);
    pen.strokeStyle = line;
    pen.strokeRect(LEFT + 0.5, i * ROW + 4.5, span, ROW - 8);
    pen.fillStyle = ink;
    pen.textAlign = "right";
    pen.font = `${i === layer ? "bold " : ""}12px sans-serif`;
    pen.fillText(`${i === layer ? "▸ " : ""}layer ${i}`, LEFT - 6, top + 8);
    pen.font = "12px sans-serif";
    if (!seen.length) {
      pen.textAlign = "left";
      return pen.fillText("no chunk is complete before this token", LEFT + 8, top + 26);
    }
    pen.fillStyle = soft;
    pen.fillText(best.toFixed(1), LEFT - 6, top + 26);
    pen.fillText(low.toFixed(1), LEFT - 6, top + ROW - 22);
    const dot = Math.max(2, Math.min(span / C - 1, 4));
    row.forEach((score, c) => Number.isFinite(score) && pen.fillRect(across(c) - dot / 2, down(score) - dot / 2, dot, dot));
    pen.strokeStyle = blue;
    pen.lineWidth = 2;
    const { K } = picture;
    for (const chunk of indices.subarray((token * J + group) * K, (token * J + group + 1) * K)) {
      if (chunk < 0) continue;
      const column = Math.floor(chunk / width);
      pen.beginPath();
      pen.arc(across(column), down(row[column]), 5, 0, 7);
      pen.stroke();
    }
    pen.lineWidth = 1;
    pen.fillStyle = red;
    for (let c = Math.floor(picture.needle[0] / picture.chunk_size / width); holdsNeedle(picture, c * width) || c * width * picture.chunk_size < picture.needle[1]; c++) {
      pen.beginPath(); // a triangle at the foot: the needle stands here
      pen.moveTo(across(c), i * ROW + ROW - 12);
      pen.lineTo(across(c) - 5, i * ROW + ROW - 4);
      pen.lineTo(across(c) + 5, i * ROW + ROW - 4);
      pen.fill();
    }
  });
  pen.strokeStyle = ink;
  if (cursor !== null && C) pen.strokeRect(across(cursor) - 3, 4, 6, high - AXIS - 6);
  pen.fillStyle = soft;
  pen.textAlign = "left";
  pen.fillText("chunk 0", LEFT, high - 6);
  pen.textAlign = "right";
  if (chunks > 1) pen.fillText(count(chunks - 1), wide - RIGHT, high - 6);
  pen.textAlign = "center";
  pen.fillText("○ kept   ▲ holds the needle", LEFT + span / 2, high - 6);
}

function describeColumn(picture, selected, column) {
  const { J, C, width, chunks } = picture, group = groupOf(picture, selected.head);
  const score = picture.layers[selected.layer].scores[(selected.token * J + group) * C + column];
  const first = column * width, last = Math.min(first + width, chunks) - 1;
  const name = width > 1 ? `Chunks ${count(first)} to ${count(last)}, the best one` : `Chunk ${count(first)}`;
  const kept = keptChunks(picture, selected).filter(({ chunk }) => first <= chunk && chunk <= last);
  const weights = kept.map(({ chunk, weight }) => `, ${width > 1 ? `chunk ${count(chunk)} ` : ""}kept with weight ${weight.toFixed(3)}`).join("");
  return `${name}: ${Number.isFinite(score) ? `score ${score.toFixed(2)}` : "not visible"}${weights}.`;
}

// ---- A kept chunk: its weight, the attention of every head, and its words

function makeChunk() {
  const title = make("div"), bar = make("div", { class: "hsa-bar" });
  const strip = make("canvas", { role: "img", style: "image-rendering: pixelated" });
  const words = make("div", { class: "hsa-words", dir: "auto" });
  const root = make("div", { class: "hsa-chunk", role: "listitem", tabindex: 0 }, make("div", {}, title, bar), make("div", {}, strip, words));
  return { root, title, bar, strip, words, spans: [] };
}

function showChunk(card, picture, kept) {
  const { chunk, weight, attention, byHead } = kept, { S } = picture;
  const first = chunk * S, texts = picture.words[chunk];
  const needle = holdsNeedle(picture, chunk), best = attention.indexOf(Math.max(...attention));
  card.chunk = chunk;
  card.root.hidden = false;
  card.root.classList.toggle("needle", needle);
  card.title.textContent = `chunk ${count(chunk)}: ${weight.toFixed(3)}${needle ? ", holds the needle" : ""}`;
  card.root.title = `The attention in this chunk adds ${sumOf(attention)}; most is on “${visible(texts[best])}” (${attention[best].toFixed(3)}).`;
  card.bar.style.width = `${100 * weight}%`;
  // Only what has changed is touched, which makes a key press fast.
  while (card.spans.length < S) card.words.append(card.spans[card.spans.push(make("span")) - 1]);
  card.spans.forEach((span, s) => {
    const inNeedle = picture.needle[0] <= first + s && first + s < picture.needle[1];
    const look = `heat-${Math.round((HEAT * attention[s]) / attention[best])}${s === best ? " top" : ""}${inNeedle ? " is-needle" : ""}`;
    if (span.textContent !== texts[s]) span.textContent = texts[s];
    if (span.className !== look) span.className = look;
  });
  drawStrip(card.strip, byHead, S);
  card.strip.setAttribute("aria-label", card.root.title);
}

function drawStrip(canvas, byHead, S) {
  canvas.width = S;
  canvas.height = byHead.length;
  canvas.style.height = `${Math.min(5 * byHead.length, 64)}px`;
  const pixels = new ImageData(S, byHead.length);
  byHead.forEach((shares, h) => {
    const best = Math.max(...shares) || 1;
    for (let s = 0; s < S; s++) pixels.data.set([230, 159, 0, 20 + (235 * shares[s]) / best], 4 * (h * S + s));
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// Bars with names: [{ name, share, note, followed }]
function showShares(list, rows) {
  list.replaceChildren(
    ...rows.map(({ name, share, note = "", followed = false }) => {
      const bar = make("div", { class: "hsa-bar", style: `width: ${100 * share}%` });
      const word = make("span", { class: followed ? "hsa-word followed" : "hsa-word" }, visible(name));
      word.style.gridColumn = note ? "" : "span 2";
      const names = note ? [word, make("small", {}, note)] : [word];
      return make("div", { class: "hsa-share", role: "listitem" }, ...names, make("div", {}, bar), make("span", {}, share.toFixed(3)));
    }),
  );
}

function blendRows(picture, kept) {
  const words = kept.flatMap(({ chunk, weight, attention }) =>
    attention.map((share, s) => ({ name: picture.words[chunk][s], note: `chunk ${count(chunk)}`, share: weight * share })),
  );
  words.sort((a, b) => b.share - a.share);
  const rest = words.slice(WORDS);
  return [...words.slice(0, WORDS), { name: `${count(rest.length)} other tokens`, share: total(rest.map(({ share }) => share)) }];
}
