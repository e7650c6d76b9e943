"""Where a run sees a class: its signed class activation map over an image. Run train_and_predict.py first."""

from PIL import Image

import spml_fast

predictor = spml_fast.load("runs/example")
image = Image.open("data/digits/images/test/00000.jpg")
maps = predictor.maps([image], classes=["3", "7"])  # float32 [1 image, 2 classes, h, w]
row, column = divmod(int(maps[0, 0].argmax()), maps.shape[3])
print(f"the strongest evidence for a 3 is in cell ({row}, {column}) of {maps.shape[2]} x {maps.shape[3]}")
