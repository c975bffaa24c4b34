"""Log a run to Weights & Biases as well: train.py --wandb=project."""

from common.settings import UserError, reason


def open_wandb(project: str, run_id: str, name: str, settings: dict):
    """The run of this id; a resumed run continues it. Raises UserError, with the reason, if it cannot be opened."""
    try:
        import wandb

        run = wandb.init(project=project, id=run_id, name=name, resume="allow", config=settings)
        run.define_metric("*", step_metric="step")  # its own counter would drop steps that are repeated after a kill
        return run
    except ImportError:
        raise UserError("--wandb needs a package: pip install wandb") from None
    except Exception as e:  # no login, no network, no such project: each raises its own type
        raise UserError(f"cannot log to Weights & Biases: {reason(e)}; without --wandb, the run can start") from None
