// The levels of the retrieval explorer: what is drawn for the selected token, layer and head. Every text is set as
// textContent, so markup in it stays text.
// Dimensions: T tokens, H query heads, J key/value heads, C columns of chunks, K kept chunks shown, S tokens of a chunk.

const WORDS = 8; // of the blend
const HEAT = 10; // shades of attention

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const keys = (moves) => (event) => {
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  event.stopPropagation();
  move();
};

const numbers = (view, Kind = Float32Array) => new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const { format: count } = new Intl.NumberFormat("en"); // toLocaleString would take a hundred times as long
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

// The kept chunks of one token in one layer: { chunk, weight, attention [S], byHead [H/J][S] }, the heaviest first. The last
// result is kept, because several parts of the page ask for it.
let lastKept = {};

function keptChunks(picture, { token, layer, head }) {
  const same = lastKept.picture === picture && lastKept.token === token && lastKept.layer === layer && lastKept.head === head;
  if (!same) lastKept = { picture, token, layer, head, kept: collectKept(picture, { token, layer, head }) };
  return lastKept.kept;
}

function collectKept(picture, { token, layer, head }) {
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

function placeOf({ asked }, token) {
  return token < asked ? `token ${token + 1} of the question` : `token ${token - asked + 1} of the answer`;
}

function holdsNeedle({ needle, chunk_size: S }, chunk) {
  return chunk * S < needle[1] && needle[0] < (chunk + 1) * S;
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

// Two bars each: [{ name, before, after }]
function showPairs(list, pairs) {
  const bar = (share, kind) => make("div", { class: `hsa-bar ${kind}`, style: `width: ${100 * share}%` });
  list.replaceChildren(...pairs.map(({ name, before, after }) => make(
    "div", { class: "hsa-share", role: "listitem" }, make("span", { class: "hsa-word" }, visible(name)),
    make("div", {}, bar(before, "before"), bar(after, "")), make("span", {}, `${before.toFixed(3)} → ${after.toFixed(3)}`),
  )));
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
