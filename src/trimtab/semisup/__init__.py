"""Semi-supervised and self-supervised learning, clustering, and category discovery."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.semisup.alignment import DistributionAlignment as DistributionAlignment
    from trimtab.semisup.alignment import QueueDistributionAlignment as QueueDistributionAlignment
    from trimtab.semisup.alignment import align_distribution as align_distribution
    from trimtab.semisup.cluster_memory import ClusterMemory as ClusterMemory
    from trimtab.semisup.depict import DEPICT as DEPICT
    from trimtab.semisup.depict import DenoisingAutoencoder as DenoisingAutoencoder
    from trimtab.semisup.depict import conv_autoencoder as conv_autoencoder
    from trimtab.semisup.depict import depict_targets as depict_targets
    from trimtab.semisup.depict import layerwise_reconstruction_loss as layerwise_reconstruction_loss
    from trimtab.semisup.depict import mlp_autoencoder as mlp_autoencoder
    from trimtab.semisup.graph_matching import black_box_matching as black_box_matching
    from trimtab.semisup.graph_matching import match_graphs as match_graphs
    from trimtab.semisup.hpm import HPM as HPM
    from trimtab.semisup.hpm import absolute_loss_prediction as absolute_loss_prediction
    from trimtab.semisup.hpm import hard_patch_mask as hard_patch_mask
    from trimtab.semisup.hpm import patchify as patchify
    from trimtab.semisup.hpm import relative_loss_prediction as relative_loss_prediction
    from trimtab.semisup.interclr import InterCLR as InterCLR
    from trimtab.semisup.interclr import draw_negatives as draw_negatives
    from trimtab.semisup.interclr import draw_positives as draw_positives
    from trimtab.semisup.interclr import inter_image_loss as inter_image_loss
    from trimtab.semisup.legogcd import GCDAccuracy as GCDAccuracy
    from trimtab.semisup.legogcd import LegoGCD as LegoGCD
    from trimtab.semisup.legogcd import LocalEntropyRegularization as LocalEntropyRegularization
    from trimtab.semisup.legogcd import dual_view_kl as dual_view_kl
    from trimtab.semisup.legogcd import gcd_accuracy as gcd_accuracy
    from trimtab.semisup.legogcd import self_distillation as self_distillation
    from trimtab.semisup.lvm_med import GraphMatchingLoss as GraphMatchingLoss
    from trimtab.semisup.lvm_med import local_similarity as local_similarity
    from trimtab.semisup.lvm_med import neighbour_edges as neighbour_edges
    from trimtab.semisup.mrdd import CLUB as CLUB
    from trimtab.semisup.mrdd import MRDD as MRDD
    from trimtab.semisup.mrdd import MaskedCrossViewVAE as MaskedCrossViewVAE
    from trimtab.semisup.mrdd import ViewSpecificVAE as ViewSpecificVAE
    from trimtab.semisup.mrdd import gaussian_kl as gaussian_kl
    from trimtab.semisup.msbreg import MSBReg as MSBReg
    from trimtab.semisup.msbreg import brownian_loss as brownian_loss
    from trimtab.semisup.msbreg import multiview_centroid_loss as multiview_centroid_loss
    from trimtab.semisup.msbreg import singular_value_loss as singular_value_loss
    from trimtab.semisup.neighbors import nearest_others as nearest_others
    from trimtab.semisup.neighbors import neighbor_graph as neighbor_graph
    from trimtab.semisup.shrinkmatch import ShrinkMatch as ShrinkMatch
    from trimtab.semisup.shrinkmatch import ShrinkMatchHead as ShrinkMatchHead
    from trimtab.semisup.shrinkmatch import shrink_class_space as shrink_class_space
    from trimtab.semisup.shrinkmatch import shrink_loss as shrink_loss
    from trimtab.semisup.simmatchv2 import SimMatchV2 as SimMatchV2
    from trimtab.semisup.simmatchv2 import edge_edge_loss as edge_edge_loss
    from trimtab.semisup.simmatchv2 import graph_propagate as graph_propagate
    from trimtab.semisup.simmatchv2 import node_edge_loss as node_edge_loss
    from trimtab.semisup.sp2ot import SP2OT as SP2OT
    from trimtab.semisup.sp2ot import SemanticPlan as SemanticPlan
    from trimtab.semisup.sp2ot import SP2OTClustering as SP2OTClustering
    from trimtab.semisup.sp2ot import knn_gaussian_affinity as knn_gaussian_affinity
    from trimtab.semisup.sp2ot import partial_cross_entropy as partial_cross_entropy
    from trimtab.semisup.sp2ot import progressive_mass as progressive_mass
    from trimtab.semisup.sp2ot import sp2ot as sp2ot
    from trimtab.semisup.sss import CoarseMaskHead as CoarseMaskHead
    from trimtab.semisup.sss import DiscriminativeFeatureEnhancement as DiscriminativeFeatureEnhancement
    from trimtab.semisup.sss import PCSWPromptGenerator as PCSWPromptGenerator
    from trimtab.semisup.sss import Prompts as Prompts
    from trimtab.semisup.sss import SSSLoss as SSSLoss
    from trimtab.semisup.sss import fuse_views as fuse_views
    from trimtab.semisup.sss import weak_to_strong_loss as weak_to_strong_loss
    from trimtab.semisup.tjepa import TJEPA as TJEPA
    from trimtab.semisup.tjepa import ColumnMasks as ColumnMasks
    from trimtab.semisup.tjepa import TabularEncoder as TabularEncoder
    from trimtab.semisup.tjepa import TabularTokenizer as TabularTokenizer
    from trimtab.semisup.tjepa import code_variance as code_variance
    from trimtab.semisup.tjepa import sample_column_masks as sample_column_masks
    from trimtab.semisup.transductive_clustering import BoundUpdate as BoundUpdate
    from trimtab.semisup.transductive_clustering import SLKResult as SLKResult
    from trimtab.semisup.transductive_clustering import TransductiveClusterer as TransductiveClusterer
    from trimtab.semisup.transductive_clustering import center_normalize as center_normalize
    from trimtab.semisup.transductive_clustering import laplacian_bound_update as laplacian_bound_update
    from trimtab.semisup.transductive_clustering import laplacian_shot as laplacian_shot
    from trimtab.semisup.transductive_clustering import rectify_prototypes as rectify_prototypes
    from trimtab.semisup.transductive_clustering import shift_queries as shift_queries
    from trimtab.semisup.transductive_clustering import slk as slk
    from trimtab.semisup.views import Distortion as Distortion
    from trimtab.semisup.views import distort as distort
    from trimtab.semisup.views import distort_masks as distort_masks
    from trimtab.semisup.views import draw_strong as draw_strong
    from trimtab.semisup.views import draw_weak as draw_weak
    from trimtab.semisup.views import strong_view as strong_view
    from trimtab.semisup.views import weak_view as weak_view
else:
    import_lazily(__name__)
