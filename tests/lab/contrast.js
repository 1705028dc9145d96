// WCAG 2.2, 1.4.3: [contrast, text, background, colour] of every text that is shown.
() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], below) =>
    [r, g, b].map((channel, n) => (channel * a + below[n] * (255 - a)) / 255);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((channel) => {
      const share = channel / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paint = (element) => {
    const style = getComputedStyle(element);
    const shape = element instanceof SVGGeometryElement;
    const colour = parse(shape ? style.fill : style.backgroundColor);
    if (shape && style.fill === "none") return [0, 0, 0, 0];
    colour[3] *= Number(style.opacity) * (shape ? Number(style.fillOpacity) : 1);
    return colour;
  };
  const texts = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    const element = node.parentElement;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!node.textContent.trim() || !box.width || !element.checkVisibility()) continue;
    if (["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const svg = element instanceof SVGElement;
    let background = over(paint(document.body), [255, 255, 255]);
    // From the back to the front, what lies under the middle of the text.
    const below = document.elementsFromPoint(box.left + box.width / 2, box.top + box.height / 2);
    for (const other of below.reverse()) {
      if (other !== element && !(other instanceof SVGTextContentElement)) {
        background = over(paint(other), background);
      }
    }
    const colour = parse(svg ? style.fill : style.color);
    colour[3] *= Number(style.opacity);
    if (!colour[3]) continue; // labels that would overlap are drawn unseen
    const [a, b] = [luminance(over(colour, background)), luminance(background)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts.push([contrast, node.textContent.trim(), String(background), String(colour)]);
  }
  return texts;
}
