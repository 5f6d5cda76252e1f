"""Many runs side by side: `vkd bench` makes them, `vkd compare` reads them, both show one table of methods."""
