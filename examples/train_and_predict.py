"""Train on the embedded digit scenes for an epoch, and name the digits in one of their images."""

import spml_fast

run = spml_fast.train("digits", {"train.epochs": 1, "run.dir": "runs/example"})
print(run.results["alpha"]["5"]["map"], "% mAP on the test split")

predictor = spml_fast.load("runs/example")
table = predictor.predict("data/digits/images/test/00000.jpg", top=3)
for row in table.to_pylist():
    print(f"{row['path']}: {row['class']} with probability {row['probability']:.2f}")
