"""Small terms that steer large models: 213 published methods for PyTorch, each with a study of its claim.

The areas are imported when they are first used, so that `import trimtab` costs nothing and needs no PyTorch:

    import trimtab

    optimizer = trimtab.optim.SGDSaI(model.parameters(), lr=1e-2)
"""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab import compress as compress
    from trimtab import continual as continual
    from trimtab import data as data
    from trimtab import detect as detect
    from trimtab import diffusion as diffusion
    from trimtab import domain as domain
    from trimtab import federated as federated
    from trimtab import finetune as finetune
    from trimtab import generative as generative
    from trimtab import graphs as graphs
    from trimtab import imaging as imaging
    from trimtab import interpret as interpret
    from trimtab import losses as losses
    from trimtab import metric as metric
    from trimtab import nets as nets
    from trimtab import ops as ops
    from trimtab import optim as optim
    from trimtab import physics as physics
    from trimtab import robust as robust
    from trimtab import scene3d as scene3d
    from trimtab import semisup as semisup
    from trimtab import solvers as solvers
    from trimtab import theory as theory
    from trimtab import unlearning as unlearning
else:
    import_lazily(__name__)

__version__ = "0.1.0"
