'use strict';
const buttons = [...document.querySelectorAll('[data-filter]')], search = document.getElementById('search');
const rows = [...document.querySelectorAll('tbody tr')], empty = document.querySelector('.empty');
function update() {
  const show = document.body.dataset.show, text = search ? search.value.trim().toLowerCase() : '';
  for (const button of buttons) button.setAttribute('aria-pressed', button.dataset.filter === show);
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  const shown = (row) => !row.hidden && (show === 'all' || row.dataset.status === show);
  for (const graph of document.querySelectorAll('.graph'))
    graph.hidden = ![...graph.querySelectorAll('tbody tr')].some(shown);
  if (empty) empty.hidden = !rows.length || rows.some(shown);
}
for (const button of buttons) button.addEventListener('click', () => {
  document.body.dataset.show = button.dataset.filter;
  history.replaceState(null, '', '#' + button.dataset.filter);
  update();
});
if (search) search.addEventListener('input', update);
const wanted = location.hash.slice(1);
if (buttons.some((button) => button.dataset.filter === wanted)) document.body.dataset.show = wanted;
update();
