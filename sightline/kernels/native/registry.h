// The operators of a training step, as torch knows them.
#pragma once

#include <torch/csrc/stable/library.h>

#include "sublayers.h"

STABLE_TORCH_LIBRARY_FRAGMENT(sightline, library) {
  library.def("bend(Tensor x, int curve, bool gated) -> Tensor");
  library.def("bend_backward(Tensor grad, Tensor x, int curve, bool gated) -> Tensor");
  library.def("drop(Tensor x, float dropout, Tensor seed) -> Tensor");
  library.def(
      "heads(Tensor x, Tensor norm, Tensor? norm_bias, float epsilon, bool centered, Tensor query, Tensor? query_bias, "
      "Tensor key, Tensor? key_bias, Tensor value, Tensor? value_bias, bool half) -> (Tensor, Tensor, Tensor)");
  library.def(
      "heads_backward(Tensor grad, Tensor x, Tensor norm, Tensor? norm_bias, float epsilon, bool centered, "
      "Tensor normed, Tensor weight, Tensor beside, bool to_weights, bool to_biases) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "write(Tensor x, Tensor rows, Tensor weight, Tensor? bias, float dropout, Tensor? seed, bool half) -> "
      "(Tensor, Tensor)");
  library.def(
      "write_backward(Tensor grad, Tensor rows, Tensor weight, float dropout, Tensor? seed, bool to_weight, "
      "bool to_bias) -> (Tensor, Tensor, Tensor)");
  library.def(
      "feed(Tensor x, Tensor norm, Tensor? norm_bias, float epsilon, bool centered, Tensor first, Tensor? first_bias, "
      "Tensor? second, Tensor? second_bias, Tensor down, Tensor? down_bias, int curve, float dropout, Tensor? seed, "
      "bool half) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "feed_backward(Tensor grad, Tensor x, Tensor norm, Tensor? norm_bias, float epsilon, bool centered, "
      "Tensor normed, Tensor up, Tensor bent, Tensor hidden, Tensor down, int curve, float dropout, Tensor? seed, "
      "bool to_ups, bool to_up_biases, bool to_down, bool to_down_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("multiply(Tensor left, Tensor right, Tensor? bias) -> Tensor");
  library.def("row_norm(Tensor x, Tensor weight, Tensor? bias, float epsilon, bool centered, bool half) -> Tensor");
  library.def(
      "row_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, float epsilon, bool centered, "
      "Tensor? beside) -> (Tensor, Tensor, Tensor)");
  library.def(
      "place(Tensor joined, int heads, int groups, int width, Tensor? query_norm, Tensor? key_norm, float epsilon, "
      "Tensor? cosine, Tensor? sine) -> Tensor");
  library.def(
      "place_backward(Tensor by_queries, Tensor by_keys, Tensor by_values, Tensor joined, int heads, int groups, "
      "int width, Tensor? query_norm, Tensor? key_norm, float epsilon, Tensor? cosine, Tensor? sine) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sightline, CPU, library) {
  library.impl("bend", TORCH_BOX(&sightline::bend));
  library.impl("bend_backward", TORCH_BOX(&sightline::bend_backward));
  library.impl("drop", TORCH_BOX(&sightline::drop));
  library.impl("heads", TORCH_BOX(&sightline::heads));
  library.impl("heads_backward", TORCH_BOX(&sightline::heads_backward));
  library.impl("write", TORCH_BOX(&sightline::write));
  library.impl("write_backward", TORCH_BOX(&sightline::write_backward));
  library.impl("feed", TORCH_BOX(&sightline::feed));
  library.impl("feed_backward", TORCH_BOX(&sightline::feed_backward));
  library.impl("multiply", TORCH_BOX(&sightline::multiply));
  library.impl("row_norm", TORCH_BOX(&sightline::row_norm));
  library.impl("row_norm_backward", TORCH_BOX(&sightline::row_norm_backward));
  library.impl("place", TORCH_BOX(&sightline::place));
  library.impl("place_backward", TORCH_BOX(&sightline::place_backward));
}
