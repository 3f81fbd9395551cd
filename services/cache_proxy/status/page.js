// Every five seconds the figures are exchanged for new ones, in place: nothing jumps, and what is selected stays.
// Without it the page is asked for anew (see the meta element beside it).
(() => {
  const EVERY_MS = 5000, PATIENCE_MS = 4000;
  async function refresh() {
    if (document.hidden || !getSelection().isCollapsed) return;
    try {
      const reply = await fetch(location.href, { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE_MS) });
      if (!reply.ok) throw new Error(reply.status);
      const fresh = new DOMParser().parseFromString(await reply.text(), 'text/html');
      if (fresh.documentElement.dataset.build !== document.documentElement.dataset.build) return location.reload();
      document.querySelector('main').replaceWith(document.adoptNode(fresh.querySelector('main')));
      document.documentElement.classList.remove('cut-off');
    } catch {
      document.documentElement.classList.add('cut-off');
    }
  }
  setInterval(refresh, EVERY_MS);
  document.addEventListener('visibilitychange', refresh);
})();
