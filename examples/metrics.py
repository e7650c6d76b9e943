"""What a run left: its options, a table of its epochs, its results. Run train_and_predict.py first."""

import spml_fast

run = spml_fast.open_run("runs/example")
print(f"{run.config.method.name} with {run.config.model.backbone}, learning rate {run.config.train.lr:g}")
for epoch in run.metrics.select(["epoch", "loss", "val_map"]).to_pylist():
    print(f"epoch {epoch['epoch']}: loss {epoch['loss']:.3f}, validation mAP {epoch['val_map']:.1f}")
for alpha, metrics in run.results["alpha"].items():
    print(f"test mAP at alpha {alpha}: {metrics['map']:.1f}")
