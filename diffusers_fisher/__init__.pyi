"""The public names, each with its home: what type checkers read, and `__init__.py` at run time."""

# diffusers' loader asks a component's module for these two names.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from .backbones import (
    Backbone as Backbone,
    PipelineDenoiser as PipelineDenoiser,
    backbone_of as backbone_of,
    register_backbone as register_backbone,
)
from .checkpoints import (
    EMBEDDED_CLASSES as EMBEDDED_CLASSES,
    embedded_checkpoint as embedded_checkpoint,
    embedded_prompt as embedded_prompt,
    embedded_test_images as embedded_test_images,
)
from .checks import (
    CheckLine as CheckLine,
    CheckReport as CheckReport,
    check as check,
)
from .curvature import (
    BoundOptions as BoundOptions,
    IntrinsicDimension as IntrinsicDimension,
    LikelihoodBound as LikelihoodBound,
    Memorisation as Memorisation,
    PosteriorUncertainty as PosteriorUncertainty,
    denoiser_intrinsic_dimension as denoiser_intrinsic_dimension,
    denoiser_likelihood_bound as denoiser_likelihood_bound,
    denoiser_memorisation as denoiser_memorisation,
    fit_level_fisher as fit_level_fisher,
    state_uncertainty as state_uncertainty,
)
from .curvature.dimension import (
    dimension_plot as dimension_plot,
)
from .curvature.memorisation_pipeline import (
    memorisation as memorisation,
)
from .curvature.pipeline import (
    intrinsic_dimension as intrinsic_dimension,
    likelihood_bound as likelihood_bound,
)
from .curvature.pixel_bound import (
    PixelBound as PixelBound,
    fit_decoder_variance as fit_decoder_variance,
    pixel_likelihood_bound as pixel_likelihood_bound,
)
from .curvature.uncertainty_pipeline import (
    PixelUncertainty as PixelUncertainty,
    decode_uncertainty as decode_uncertainty,
    posterior_uncertainty as posterior_uncertainty,
)
from .denoiser import (
    Denoiser as Denoiser,
)
from .distributions import (
    Covariance as Covariance,
    DCTBasis as DCTBasis,
    DiracMixture as DiracMixture,
    GaussianMixture as GaussianMixture,
)
from .errors import (
    CheckpointError as CheckpointError,
    CoarseGridWarning as CoarseGridWarning,
    DistilledNetworkWarning as DistilledNetworkWarning,
    FisherError as FisherError,
    InputError as InputError,
    NumericalError as NumericalError,
    ProbeNoiseWarning as ProbeNoiseWarning,
    TraceModelWarning as TraceModelWarning,
    TrajectoryError as TrajectoryError,
    UnsupportedError as UnsupportedError,
)
from .evaluation.guidance_worker import (
    GuidanceWorker as GuidanceWorker,
)
from .evaluation.scorer import (
    LikelihoodScorer as LikelihoodScorer,
)
from .fisher import (
    AutodiffFisher as AutodiffFisher,
    DirectFisher as DirectFisher,
    EndpointFisher as EndpointFisher,
    Estimate as Estimate,
    ExactFisher as ExactFisher,
    FiniteDifferenceFisher as FiniteDifferenceFisher,
    FisherEstimator as FisherEstimator,
    FisherOperator as FisherOperator,
    GaussianFisher as GaussianFisher,
    LevelFisher as LevelFisher,
    OneStepFisher as OneStepFisher,
    Probes as Probes,
    TraceCorrectedFisher as TraceCorrectedFisher,
    TraceMatchingFisher as TraceMatchingFisher,
    centred_endpoint_error_bound as centred_endpoint_error_bound,
    endpoint_error_bound as endpoint_error_bound,
    norm_trace_error_bound as norm_trace_error_bound,
    rademacher as rademacher,
    residual_trace_error_bound as residual_trace_error_bound,
)
from .guidance import (
    AestheticReward as AestheticReward,
    BlipReward as BlipReward,
    ClassifierReward as ClassifierReward,
    FiniteDifferenceReward as FiniteDifferenceReward,
    GuidanceOutput as GuidanceOutput,
    GuidanceStep as GuidanceStep,
    ImageInput as ImageInput,
    LikelihoodRegulariser as LikelihoodRegulariser,
    LinearReward as LinearReward,
    MeasurementReward as MeasurementReward,
    NoiseWhiteness as NoiseWhiteness,
    PosteriorGuidance as PosteriorGuidance,
    TextImageReward as TextImageReward,
    WeightedReward as WeightedReward,
    gaussian_blur as gaussian_blur,
    named_reward as named_reward,
    noise_whiteness as noise_whiteness,
    posterior_guidance as posterior_guidance,
)
from .guidance.pareto import (
    ParetoOutput as ParetoOutput,
    guide_pareto as guide_pareto,
)
from .guidance.pipeline import (
    guide as guide,
)
from .likelihood import (
    CheckpointComparison as CheckpointComparison,
    CheckpointDifferences as CheckpointDifferences,
    Integration as Integration,
    LikelihoodComparison as LikelihoodComparison,
    LikelihoodOutput as LikelihoodOutput,
    SquaredErrorOutput as SquaredErrorOutput,
    integrate_log_likelihood as integrate_log_likelihood,
)
from .likelihood.calibration import (
    calibrate_trace_model as calibrate_trace_model,
)
from .likelihood.checkpoints import (
    compare_checkpoints as compare_checkpoints,
)
from .likelihood.held_out import (
    HeldOutLikelihood as HeldOutLikelihood,
)
from .likelihood.output import (
    likelihood_plot as likelihood_plot,
)
from .likelihood.pipeline import (
    compare_likelihood as compare_likelihood,
    log_likelihood as log_likelihood,
)
from .models import (
    FisherTraceModel as FisherTraceModel,
)
from .noise import (
    DenoisingState as DenoisingState,
    NoiseLevel as NoiseLevel,
    NoiseSchedule as NoiseSchedule,
    noise_level as noise_level,
    noise_schedule as noise_schedule,
    register_noise_schedule as register_noise_schedule,
)
from .pictures import (
    fisher_pictures as fisher_pictures,
    memorisation_pictures as memorisation_pictures,
    trace_plot as trace_plot,
    uncertainty_pictures as uncertainty_pictures,
)
from .pipelines import (
    AuraFlowFisherPipeline as AuraFlowFisherPipeline,
    AutoFisherPipeline as AutoFisherPipeline,
    ChromaFisherPipeline as ChromaFisherPipeline,
    CogView4FisherPipeline as CogView4FisherPipeline,
    DDIMFisherPipeline as DDIMFisherPipeline,
    DDPMFisherPipeline as DDPMFisherPipeline,
    DiTFisherPipeline as DiTFisherPipeline,
    FisherPipelineMixin as FisherPipelineMixin,
    Flux2FisherPipeline as Flux2FisherPipeline,
    Flux2KleinFisherPipeline as Flux2KleinFisherPipeline,
    FluxFisherPipeline as FluxFisherPipeline,
    HiDreamImageFisherPipeline as HiDreamImageFisherPipeline,
    HunyuanDiTFisherPipeline as HunyuanDiTFisherPipeline,
    KandinskyV22FisherPipeline as KandinskyV22FisherPipeline,
    LDMFisherPipeline as LDMFisherPipeline,
    Lumina2FisherPipeline as Lumina2FisherPipeline,
    PixArtAlphaFisherPipeline as PixArtAlphaFisherPipeline,
    PixArtSigmaFisherPipeline as PixArtSigmaFisherPipeline,
    QwenImageFisherPipeline as QwenImageFisherPipeline,
    SanaFisherPipeline as SanaFisherPipeline,
    StableDiffusion3FisherPipeline as StableDiffusion3FisherPipeline,
    StableDiffusionFisherPipeline as StableDiffusionFisherPipeline,
    StableDiffusionXLFisherPipeline as StableDiffusionXLFisherPipeline,
    ZImageFisherPipeline as ZImageFisherPipeline,
    custom_pipeline_file as custom_pipeline_file,
    fisher_pipeline as fisher_pipeline,
)
from .schedulers import (
    FisherSchedulerMixin as FisherSchedulerMixin,
    OptimalVarianceDDPMScheduler as OptimalVarianceDDPMScheduler,
    OptimalVarianceFlowMatchScheduler as OptimalVarianceFlowMatchScheduler,
    Trajectory as Trajectory,
    fisher_scheduler as fisher_scheduler,
    optimal_variance_scheduler as optimal_variance_scheduler,
)
from .schedulers.catalog import (
    FisherDDIMInverseScheduler as FisherDDIMInverseScheduler,
    FisherDDIMScheduler as FisherDDIMScheduler,
    FisherDDPMScheduler as FisherDDPMScheduler,
    FisherDEISMultistepScheduler as FisherDEISMultistepScheduler,
    FisherDPMSolverMultistepInverseScheduler as FisherDPMSolverMultistepInverseScheduler,
    FisherDPMSolverMultistepScheduler as FisherDPMSolverMultistepScheduler,
    FisherDPMSolverSinglestepScheduler as FisherDPMSolverSinglestepScheduler,
    FisherEDMEulerScheduler as FisherEDMEulerScheduler,
    FisherEulerAncestralDiscreteScheduler as FisherEulerAncestralDiscreteScheduler,
    FisherEulerDiscreteScheduler as FisherEulerDiscreteScheduler,
    FisherFlowMatchEulerDiscreteScheduler as FisherFlowMatchEulerDiscreteScheduler,
    FisherFlowMatchHeunDiscreteScheduler as FisherFlowMatchHeunDiscreteScheduler,
    FisherHeunDiscreteScheduler as FisherHeunDiscreteScheduler,
    FisherKDPM2DiscreteScheduler as FisherKDPM2DiscreteScheduler,
    FisherLCMScheduler as FisherLCMScheduler,
    FisherLMSDiscreteScheduler as FisherLMSDiscreteScheduler,
    FisherPNDMScheduler as FisherPNDMScheduler,
    FisherSASolverScheduler as FisherSASolverScheduler,
    FisherTCDScheduler as FisherTCDScheduler,
    FisherUniPCMultistepScheduler as FisherUniPCMultistepScheduler,
)
from .studies.lml import (
    LMLDDIMScheduler as LMLDDIMScheduler,
    LMLDPMSolverMultistepScheduler as LMLDPMSolverMultistepScheduler,
    LMLFlowMatchEulerDiscreteScheduler as LMLFlowMatchEulerDiscreteScheduler,
)

__version__: str
__all__: list[str]
