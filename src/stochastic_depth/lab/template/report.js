"use strict";

// The number behind a mark is its aria-label: shown for the mark nearest to the pointer.
const tip = document.getElementById("tip");
const reach = 28;

function distance(box, x, y) {
  const across = Math.max(box.left - x, 0, x - box.right);
  const along = Math.max(box.top - y, 0, y - box.bottom);
  // A bar lies below the strokes on it: what is small is meant first.
  return Math.hypot(across, along) + Math.min(12, Math.min(box.width, box.height) / 2);
}

function hide(svg) {
  tip.hidden = true;
  svg.querySelector(".near")?.classList.remove("near");
}

for (const svg of document.querySelectorAll("figure svg")) {
  const marks = [...svg.querySelectorAll("[role=graphics-symbol][aria-label]")];
  const look = (event) => {
    hide(svg);
    let near = null;
    let least = reach;
    for (const mark of marks) {
      const away = distance(mark.getBoundingClientRect(), event.clientX, event.clientY);
      if (away < least) [near, least] = [mark, away];
    }
    if (near === null) return;
    near.classList.add("near");
    tip.textContent = near.getAttribute("aria-label");
    tip.hidden = false;
    const box = near.getBoundingClientRect();
    const centre = box.width > 60 ? event.clientX : box.left + box.width / 2;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const left = Math.max(8, Math.min(room, centre - tip.offsetWidth / 2));
    const top = Math.max(8, box.top - tip.offsetHeight - 10);
    tip.style.transform = `translate(${left}px, ${top}px)`;
  };
  svg.addEventListener("pointermove", look);
  svg.addEventListener("pointerdown", look);
  svg.addEventListener("pointerleave", () => hide(svg));
}

// While runs are under way the file is written again and again; whoever reads keeps place and open
// parts. They are noted when the page goes: it still takes clicks while the next one is loaded.
const seconds = Number(document.documentElement.dataset.refresh);
if (seconds) {
  const parts = [...document.querySelectorAll("details")];
  const key = "open:" + location.pathname;
  for (const n of (sessionStorage.getItem(key) || "").split(",")) {
    if (n in parts) parts[n].open = true;
  }
  addEventListener("pagehide", () => {
    sessionStorage.setItem(key, parts.flatMap((part, n) => (part.open ? [n] : [])).join());
  });
  const ticking = setInterval(() => {
    if (!tip.hidden || document.hidden) return;
    clearInterval(ticking);
    location.reload();
  }, 1000 * seconds);
}
