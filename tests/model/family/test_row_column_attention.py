"""Row-column decoupled attention against plain loops, and against dense attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.family.row_column_attention import RowColumnAttention
from model.parts import Memory


def attention(dropout: float = 0.0) -> RowColumnAttention:
    torch.manual_seed(0)
    module = RowColumnAttention(hidden_dim=8, num_heads=2, dropout=dropout).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def memory(height: int, width: int, valid: list[tuple[int, int]]) -> Memory:
    """Of random tokens and places; valid: (h, w) cells of each image."""
    batch = len(valid)
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    for image, (h, w) in enumerate(valid):
        mask[image, :h, :w] = False
    return Memory(
        tokens=torch.randn(batch, height * width, 8, dtype=torch.float64),
        position=torch.randn(batch, width + height, 8, dtype=torch.float64),
        masks=[mask],
        padding=mask.flatten(1),
        shapes=[(height, width)],
        sizes=torch.tensor([[(w, h)] for h, w in valid]),
        ratios=torch.tensor([[(w / width, h / height)] for h, w in valid]),
    )


def queries(batch: int, count: int) -> tuple[Tensor, Tensor]:
    query_x, query_y = torch.randn(2, batch, count, 8, dtype=torch.float64)
    return query_x, query_y


def test_it_is_what_loops_over_columns_and_rows_give() -> None:
    module, seen = attention(), memory(3, 4, [(3, 4), (2, 3)])
    query_x, query_y = queries(2, 5)
    found = module(query_x, query_y, seen)
    for image, (height, width) in enumerate([(3, 4), (2, 3)]):
        cells = seen.tokens[image].view(3, 4, 8)  # padded ones count in the means
        columns, rows = seen.position[image, :4], seen.position[image, 4:]
        key_x = [module.key_x_proj(cells[:, w].mean(0) + columns[w]) for w in range(width)]
        key_y = [module.key_y_proj(cells[h].mean(0) + rows[h]) for h in range(height)]
        for query in range(5):
            asked_x = module.query_x_proj(query_x[image, query])
            asked_y = module.query_y_proj(query_y[image, query])
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                over_x = torch.stack([asked_x[part] @ key[part] / 2 for key in key_x]).softmax(0)
                over_y = torch.stack([asked_y[part] @ key[part] / 2 for key in key_y]).softmax(0)
                total = torch.zeros(4, dtype=torch.float64)
                for h in range(height):
                    for w in range(width):
                        total = total + over_y[h] * over_x[w] * module.value_proj(cells[h, w])[part]
                heads.append(total)
            expected = module.output_proj(torch.cat(heads))
            torch.testing.assert_close(found[image, query], expected, rtol=1e-11, atol=1e-12)


def test_it_is_dense_attention_with_a_columns_and_a_rows_key_for_each_cell() -> None:
    module, seen = attention(), memory(5, 2, [(5, 2), (4, 1), (1, 2)])
    query_x, query_y = queries(3, 6)
    cells = seen.tokens.view(3, 5, 2, 8)
    columns, rows = seen.position.split((2, 5), dim=1)
    key_x = module.key_x_proj(cells.mean(1) + columns)[:, None].expand(-1, 5, -1, -1)
    key_y = module.key_y_proj(cells.mean(2) + rows)[:, :, None].expand(-1, -1, 2, -1)

    def heads(*parts: Tensor) -> Tensor:
        """Each [N, K, 8] to the heads' parts side by side: [N, 2, K, 4 for each]."""
        return torch.cat([x.unflatten(-1, (2, 4)).transpose(1, 2) for x in parts], dim=-1)

    attended = F.scaled_dot_product_attention(
        heads(module.query_x_proj(query_x), module.query_y_proj(query_y)),
        heads(key_x.flatten(1, 2), key_y.flatten(1, 2)),
        heads(module.value_proj(seen.tokens)),
        ~seen.padding[:, None, None],
        scale=4**-0.5,
    )
    expected = module.output_proj(attended.transpose(1, 2).flatten(2))
    found = module(query_x, query_y, seen)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_one_cell_is_all_there_is_to_see() -> None:
    module, seen = attention(), memory(3, 4, [(1, 1)])
    found = module(*queries(1, 2), seen)
    expected = module.output_proj(module.value_proj(seen.tokens[:, :1])).expand(-1, 2, -1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    module, seen = attention(), memory(2, 3, [(2, 3), (2, 2)])

    def of(query_x: Tensor, query_y: Tensor, tokens: Tensor, position: Tensor) -> Tensor:
        return module(query_x, query_y, seen._replace(tokens=tokens, position=position))

    asked = queries(2, 2)
    inputs = [x.clone().requires_grad_() for x in (*asked, seen.tokens, seen.position)]
    assert torch.autograd.gradcheck(of, inputs)


def test_weights_drop_out_in_training_alone() -> None:
    module, seen = attention(dropout=0.5), memory(3, 4, [(3, 4)])
    asked = queries(1, 2)
    assert torch.equal(module(*asked, seen), module(*asked, seen))
    module.train()
    assert not torch.equal(module(*asked, seen), module(*asked, seen))


def test_the_start_is_that_of_the_published_code() -> None:
    """Xavier's rule for one matrix [5 C, C], which is nn.Linear's own bound, and no biases."""
    state = RowColumnAttention(hidden_dim=64, num_heads=2, dropout=0.0).state_dict()
    assert len(state) == 12
    for name, value in state.items():
        largest = value.abs().max()
        assert 0.95 / 8 < largest <= 1 / 8 if name.endswith("weight") else largest == 0, name
