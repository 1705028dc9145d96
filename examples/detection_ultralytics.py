"""Detection with Ultralytics' own trainer: a callback applies stochastic depth to its network."""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from ultralytics import YOLO

import stochastic_depth as sd

folder = Path(tempfile.mkdtemp())  # stands for your data: eight pictures, a box in each
for part in ("images", "labels"):
    (folder / part).mkdir()
for number in range(8):
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "images" / f"{number}.png")
    (folder / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
data = folder / "data.yaml"
data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames:\n  0: noise\n")


def skip_blocks(trainer):
    network = trainer.model
    handle = sd.apply(network, drop_rate=0.5, example=torch.rand(2, 3, 64, 64))
    saving = sd.summary(network, torch.rand(2, 3, 64, 64)).expected_saving
    print(f"{handle.expected_depth:.1f} of {len(handle.blocks)} bottlenecks a step, on average")
    print(f"{100 * saving:.0f} % of the FLOPs saved")


detector = YOLO("yolov8n.yaml")
detector.add_callback("on_pretrain_routine_end", skip_blocks)
detector.train(
    data=data, epochs=1, imgsz=64, batch=4, device="cpu", workers=0, amp=False, plots=False,
    project=str(folder / "runs"), verbose=False,
)  # fmt: skip
