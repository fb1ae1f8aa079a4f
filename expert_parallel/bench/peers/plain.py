"""Implements peers in plain PyTorch: a loop over experts with masks, GShard's one-hot einsum, and a dense layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expert_parallel.bench.peers.implementation import Case, Implementation, NotMeasured
from expert_parallel.nn.ffn import ACTIVATIONS, w_in_columns

LARGEST_ONE_HOT = 4e9  # bytes


class PlainLayer(nn.Module):
    """Routes by the top-k of a softmax with weights that sum to 1 (for k = 1: the score itself), as ours does; one
    parameter per expert."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        weights = case.weights
        self.k, self.activate = case.shape.k, ACTIVATIONS[case.activation]
        self.router_ED = nn.Parameter(weights.router_ED.clone())
        self.w_in = nn.ParameterList(weights.w_in_eDF.clone().unbind(0))
        self.w_out = nn.ParameterList(weights.w_out_eFD.clone().unbind(0))

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights_TK, float32, and expert_ids_TK."""
        # float32 scores, as in our router.
        scores_TE = (x_TD.float() @ self.router_ED.float().T).softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(self.k)
        return (weights_TK / weights_TK.sum(-1, keepdim=True) if self.k > 1 else weights_TK), ids_TK


class MaskLoop(PlainLayer):
    """Computes the layer as a first implementation does: each expert selects its tokens by a mask and adds its
    outputs."""

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = self.route(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for expert, (w_in, w_out) in enumerate(zip(self.w_in, self.w_out, strict=True)):
            token, choice = torch.where(ids_TK == expert)
            rows_RD = self.activate(x_TD[token] @ w_in) @ w_out
            y_TD.index_add_(0, token, (rows_RD * weights_TK[token, choice, None]).to(x_TD.dtype))
        return y_TD


class OneHotEinsum(PlainLayer):
    """Computes the layer as GShard does (Lepikhin et al. 2020): products with one-hot tensors (T, E, C) fill and empty
    a buffer of C rows for each expert. C is what the fullest expert needs, so that nothing is dropped."""

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = self.route(x_TD)
        num_experts = len(self.router_ED)
        chosen_TKE = F.one_hot(ids_TK, num_experts)
        place_TKE = (chosen_TKE.flatten(0, 1).cumsum(0) - 1).view_as(chosen_TKE)
        capacity = int(chosen_TKE.sum((0, 1)).max())  # waits for the device
        place_TK = (place_TKE * chosen_TKE).sum(-1)
        slot_TKC = F.one_hot(place_TK, capacity).float()
        combine_TEC = torch.einsum("tk,tke,tkc->tec", weights_TK, chosen_TKE.float(), slot_TKC).to(x_TD.dtype)
        x_ECD = torch.einsum("tec,td->ecd", (combine_TEC > 0).to(x_TD.dtype), x_TD)
        hidden_ECF = self.activate(torch.einsum("ecd,edf->ecf", x_ECD, torch.stack(list(self.w_in))))
        y_ECD = torch.einsum("ecf,efd->ecd", hidden_ECF, torch.stack(list(self.w_out)))
        return torch.einsum("tec,ecd->td", combine_TEC, y_ECD)


class DenseFFN(nn.Module):
    """Computes one network with the hidden columns of all experts, which every token uses."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        shape = case.shape
        hidden = shape.num_experts * shape.hidden
        columns = w_in_columns(case.activation, hidden)
        self.activate = ACTIVATIONS[case.activation]

        def normal(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, dtype=case.dtype, device=case.device) * rows**-0.5)

        self.w_in, self.w_out = normal(shape.d_model, columns), normal(hidden, shape.d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.activate(x_TD @ self.w_in) @ self.w_out


class DenseImplementation(Implementation):
    """Runs the dense network, whose outputs are not compared with the others'."""

    is_compared = False


def build_mask_loop(case: Case) -> Implementation:
    """Builds the loop over experts."""
    case.require_one_rank()
    return Implementation(MaskLoop(case), f"dropless, {case.activation}", f"torch {torch.__version__}")


def build_einsum(case: Case) -> Implementation:
    """Builds the one-hot einsum. Raises `NotMeasured` where its tensors would be too large."""
    case.require_one_rank()
    one_hot = 4 * case.shape.tokens**2 * case.shape.k  # bytes of (T, E, C) in float32, with C = T * k / E
    if one_hot > LARGEST_ONE_HOT:
        raise NotMeasured(f"each of its one-hot tensors would take {one_hot / 1e9:.0f} GB")
    return Implementation(
        OneHotEinsum(case), f"padded to the fullest expert, {case.activation}", f"torch {torch.__version__}"
    )


def build_dense(case: Case) -> Implementation:
    """Builds the dense layer; each rank computes its own tokens."""
    hidden = case.shape.num_experts * case.shape.hidden
    computes = f"dense, hidden {hidden}, {case.activation}"
    return DenseImplementation(DenseFFN(case), computes, f"torch {torch.__version__}")
