const EVERY_MS = 2000;
let version = Number(document.body.dataset.version);
const ahead = Date.now() / 1000 - Number(document.body.dataset.now);  // this clock, before the server's

function describeAge(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 100) return `${s} s`;
  if (s < 6000) return `${Math.round(s / 60)} min`;
  const minutes = Math.round(s / 60);
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function countUp() {
  for (const time of document.querySelectorAll("[data-since]"))
    time.textContent = describeAge(Date.now() / 1000 - ahead - Number(time.dataset.since));
}

function show(id, html) {
  const section = document.getElementById(id);
  const open = [...section.querySelectorAll("details[open]")].map((details) => details.id);
  const focused = section.contains(document.activeElement) ? document.activeElement.id : "";
  section.innerHTML = html;
  for (const details of section.querySelectorAll("details")) details.open = open.includes(details.id);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

function showArms() {
  for (const box of document.querySelectorAll("[data-style]")) box.checked = !document.body.classList.contains(`h${box.dataset.style}`);
}

document.addEventListener("change", ({ target }) => {
  if (target.dataset.style) document.body.classList.toggle(`h${target.dataset.style}`, !target.checked);
  showArms();
});

async function poll() {
  try {
    if (!document.hidden) {
      const answer = await fetch(`${location.origin}/changes?after=${version}`, { signal: AbortSignal.timeout(10000) });
      if (!answer.ok) throw new Error(answer.status);
      const news = answer.status === 204 ? { version, sections: {} } : await answer.json();
      for (const [id, html] of Object.entries(news.sections)) show(id, html);
      version = news.version;
      document.title = document.querySelector("[data-title]").dataset.title;
      countUp();
      showArms();
    }
    document.getElementById("lost").hidden = true;
  } catch {
    document.getElementById("lost").hidden = false;
  }
  setTimeout(poll, EVERY_MS);
}

countUp();
setInterval(countUp, 1000);
setTimeout(poll, EVERY_MS);
