"""Data: turn files of chats and text into packed, sharded, resumable batches."""

from gptoss_jax.data.describe import changes as changes
from gptoss_jax.data.describe import describe as describe
from gptoss_jax.data.describe import describe_length as describe_length
from gptoss_jax.data.describe import differences as differences
from gptoss_jax.data.describe import fingerprint as fingerprint
from gptoss_jax.data.describe import keep_records as keep_records
from gptoss_jax.data.describe import steps_per_epoch as steps_per_epoch
from gptoss_jax.data.loader import Question as Question
from gptoss_jax.data.loader import TrainBatches as TrainBatches
from gptoss_jax.data.loader import eval_batches as eval_batches
from gptoss_jax.data.loader import eval_questions as eval_questions
from gptoss_jax.data.loader import train_batches as train_batches
from gptoss_jax.data.shards import rows_here as rows_here
from gptoss_jax.data.shards import rows_of as rows_of
from gptoss_jax.data.shards import spread as spread
