// Every five seconds the content is replaced in place, so that nothing moves and a selection is kept.
// Without JavaScript the browser reloads the page (see the meta element).
(() => {
  const INTERVAL_MS = 5000;
  const TIMEOUT_MS = 4000;
  async function refresh() {
    if (document.hidden || !getSelection().isCollapsed) return;
    try {
      const reply = await fetch(location.href, { cache: 'no-store', signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (!reply.ok) throw new Error(reply.status);
      const fresh = new DOMParser().parseFromString(await reply.text(), 'text/html');
      if (fresh.documentElement.dataset.build !== document.documentElement.dataset.build) return location.reload();
      document.querySelector('main').replaceWith(document.adoptNode(fresh.querySelector('main')));
      document.documentElement.classList.remove('cut-off');
    } catch {
      document.documentElement.classList.add('cut-off');
    }
  }
  setInterval(refresh, INTERVAL_MS);
  document.addEventListener('visibilitychange', refresh);
})();
