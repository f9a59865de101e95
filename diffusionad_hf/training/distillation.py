"""A trained model as the teacher of another one."""

import torch

from ..pipeline_diffusionad import DiffusionADPipeline


def load_teacher(model: str, pupil: DiffusionADPipeline) -> DiffusionADPipeline:
    """
    Loads the model that `distill_from` names.

    Args:
        model: Pipeline folder or Hub id.
        pupil: The pipeline that is to learn from it.

    Raises:
        OSError, ValueError: If it cannot be loaded, or answers other questions than the pupil is asked: images of
            another size, or noise of other scales.
    """
    teacher = DiffusionADPipeline.from_pretrained(model, dtype=torch.float32)
    theirs, ours = teacher.config.image_size, pupil.config.image_size
    if theirs != ours:
        raise ValueError(
            f"`distill_from` {model}: inspects at {theirs} px, and this training is for {ours} px; give `resolution` "
            f"{theirs}, or a model of {ours} px."
        )
    if not torch.equal(teacher.scheduler.betas, pupil.scheduler.betas):
        raise ValueError(
            f"`distill_from` {model}: was trained with another noise schedule (its scheduler's betas differ); give a "
            "model with that of this package."
        )
    for network in (teacher.unet, teacher.segmenter):
        network.requires_grad_(False)
    return teacher


def take_weights_that_fit(teacher: DiffusionADPipeline, pupil: DiffusionADPipeline) -> list[str]:
    """
    Starts the networks that have the teacher's size, and predict what it predicts, with its weights.

    Returns:
        `list[str]`: Which ones, `"unet"`, `"segmenter"` or both.
    """
    taken = []
    for name in ("unet", "segmenter"):
        theirs, ours = (getattr(pipe, name) for pipe in (teacher, pupil))
        shapes = [[(key, tensor.shape) for key, tensor in n.state_dict().items()] for n in (theirs, ours)]
        types = [pipe.scheduler.config.prediction_type for pipe in (teacher, pupil)]
        if shapes[0] == shapes[1] and (name == "segmenter" or types[0] == types[1]):
            ours.load_state_dict(theirs.state_dict())
            taken.append(name)
    return taken
