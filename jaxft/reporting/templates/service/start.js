window.addEventListener("hashchange", () => {
  show();
  view.focus({ preventScroll: true });
  scrollTo(0, 0);
});
show();
