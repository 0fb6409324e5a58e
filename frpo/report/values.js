// A mark of a drawing says its words beside the pointer, or the finger. Without scripts they stay a <title>.
const tip = document.getElementById("tip"), REACH = 18, SMALL = 24;

for (const title of document.querySelectorAll("svg g > title")) {
  title.parentNode.dataset.words = title.textContent;
  title.remove();
}

function distance(mark, x, y) {
  const box = mark.getBoundingClientRect(), size = Math.max(box.width, box.height);
  if (!size || size > SMALL) return Infinity;  // hidden, or a line
  return Math.hypot(box.left + box.width / 2 - x, box.top + box.height / 2 - y);
}

function findMarks(target, x, y) {
  const near = [...(target.closest("svg")?.querySelectorAll("[data-words]") ?? [])].map((mark) => [distance(mark, x, y), mark]);
  const least = Math.min(...near.map(([far]) => far));
  if (!(least <= REACH)) return [target.closest("[data-words]")];
  return near.filter(([far]) => far < least + 1).map(([, mark]) => mark);  // those that lie on one another
}

async function say({ target, clientX: x, clientY: y }) {
  const words = findMarks(target, x, y).map((mark) => mark?.dataset.words);
  tip.hidden = !words[0];
  if (tip.hidden) return;
  tip.textContent = words.join("\n");
  const pointer = { getBoundingClientRect: () => new DOMRect(x, y, 0, 0) };
  const { offset, flip, shift } = FloatingUIDOM;
  const middleware = [offset(14), flip(), shift({ padding: 8 })];
  const at = await FloatingUIDOM.computePosition(pointer, tip, { strategy: "fixed", placement: "top", middleware });
  Object.assign(tip.style, { left: `${at.x}px`, top: `${at.y}px` });
}

for (const event of ["pointermove", "pointerdown"]) document.addEventListener(event, say);
document.addEventListener("scroll", () => (tip.hidden = true), { capture: true, passive: true });
