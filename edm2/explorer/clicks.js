/* For gr.HTML's js_on_load: find which image of a grid was clicked. */
element.addEventListener('click', event => {
  const sheet = event.target.closest('.sheet');
  if (!sheet) return;
  const image = sheet.querySelector('img'), box = image.getBoundingClientRect(), data = sheet.dataset;
  const [width, height] = data.cell.split(',').map(Number), gap = Number(data.gap);
  const scale = image.naturalWidth / box.width;
  const column = Math.floor(((event.clientX - box.left) * scale - gap / 2) / width);
  const row = Math.floor(((event.clientY - box.top) * scale - gap / 2) / height);
  const position = row * Number(data.columns) + column;
  if (column >= 0 && column < data.columns && position >= 0 && position < data.count) trigger('click', {position});
});
