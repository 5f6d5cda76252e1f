"""The adapters that come with vkd-framework, one file a family, registered exactly as anybody else's would be."""
