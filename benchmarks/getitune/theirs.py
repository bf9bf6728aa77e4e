"""What runs in getitune's own environment, started by `__main__`: `python theirs.py JOB.json`.

A job has `classes`, `pictures` (subset -> pairs of file and label), `recipe` and `options` of
getitune, `epochs` and `precision`. The pictures are converted for Datumaro; then getitune trains,
exports, quantises, and OpenVINO's ModelAPI, with which it deploys, answers the test pictures.
Writes `result.json` beside the job.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

MOST = 300  # pictures for quantisation: getitune's recommendation


def convert(job: dict[str, Any], folder: Path) -> None:
    """The pictures in Datumaro's own format: getitune reads no class folders."""
    import polars as pl
    from datumaro.experimental import Dataset, Sample
    from datumaro.experimental.categories import LabelCategories
    from datumaro.experimental.export_import import ExportMode, export_dataset
    from datumaro.experimental.fields import (
        ImageInfo,
        Subset,
        image_info_field,
        image_path_field,
        label_field,
        subset_field,
    )
    from PIL import Image

    class Picture(Sample):
        image: str = image_path_field()
        label: int = label_field(pl.UInt16())
        subset: Subset = subset_field()
        image_info: ImageInfo = image_info_field()

    dataset = Dataset(Picture, categories={"label": LabelCategories(labels=tuple(job["classes"]))})
    for subset, pictures in job["pictures"].items():
        for file, label in pictures:
            width, height = Image.open(file).size
            info = ImageInfo(width=width, height=height)
            dataset.append(Picture(image=file, label=label, subset=Subset[subset], image_info=info))
    export_dataset(dataset, folder, export_media=ExportMode.COPY)


def cpu_seconds() -> float:
    """Of this process and the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def answers(model: Path, job: dict[str, Any]) -> list[int]:
    """What the exported model answers to the test pictures, as numbers of classes."""
    import cv2
    from model_api.models import Model

    network, names = Model.create_model(str(model)), list(job["classes"])
    every = []
    for file, _ in job["pictures"]["TESTING"]:
        picture = cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB)
        best = network(picture).top_labels[0]
        every.append(names.index(best.name))
    return every


def main(file: Path) -> None:
    import getitune
    from getitune.backend.lightning.engine import LightningEngine
    from getitune.engine import create_engine

    job, folder = json.loads(file.read_text()), file.parent
    data = Path(job["data"])
    if not data.exists():
        convert(job, data)
    recipes = Path(getitune.__file__).parent / "recipe" / "classification" / "multi_class_cls"
    engine = LightningEngine.from_config(
        recipes / f"{job['recipe']}.yaml",
        data=data,
        work_dir=folder / "getitune",
        device="cpu",
        **job["options"],
    )
    trained = folder / "trained.json"  # a fault in what follows does not cost the training
    if not trained.exists():
        wall, cpu = time.perf_counter(), cpu_seconds()
        engine.train(max_epochs=job["epochs"], seed=0, precision=job["precision"])
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        epochs, best = engine.trainer.current_epoch, str(engine.checkpoint)
        trained.write_text(json.dumps({"epochs": epochs, "seconds": seconds, "checkpoint": best}))
    training = json.loads(trained.read_text())
    models = {"fp32": Path(engine.export(checkpoint=training.pop("checkpoint")))}
    work, pictures = folder / "quantised", engine.datamodule
    work.mkdir(exist_ok=True)
    deployed = create_engine(model=str(models["fp32"]), data=pictures, work_dir=work)
    models["int8"] = Path(deployed.optimize(max_data_subset_size=MOST))
    result = {
        **training,
        "models": {precision: str(model) for precision, model in models.items()},
        "answers": {precision: answers(model, job) for precision, model in models.items()},
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
