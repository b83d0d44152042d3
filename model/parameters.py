"""Which parameters learn at which rate (section 5: backbone and offsets at a tenth)."""

from torch import nn


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters, each in one group, in the model's own order.

    "backbone": the backbone's. "offsets": the linear projections that give sampling offsets and
    the queries' reference points. "rest": all others. A group may be empty.
    """
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "offsets": [], "rest": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "backbone" in name.split("."):  # anywhere: other libraries nest theirs deeper
            groups["backbone"].append(parameter)
        elif "sampling_offsets" in name or "reference_points" in name:
            groups["offsets"].append(parameter)
        else:
            groups["rest"].append(parameter)
    return groups
