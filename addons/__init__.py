"""Optional parts of image_text_sim_clip, each imported only where its config key asks for it."""
