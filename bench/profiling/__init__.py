"""One op, or one public function, at one size: where its time goes, kernel by kernel."""
