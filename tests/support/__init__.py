"""What tests of several rooms need. Megatron-Core comes in through the package, as in an export: its functions are not compiled."""

from megatron_export.common.optional import part

part("mcore.build")
