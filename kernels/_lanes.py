"""The arithmetic of one element, for every backend: the words it uses (`exp`, `where`, ...) are the backend's own.

A lane has the name of its card and takes operands, then scalars, all in the arithmetic of the card's `dtype`; a flag of
the card chooses another lane, as ``gelu_tanh``, and so do integers, as ``pow_int64``. A card that is a word, such as
``aten.exp``, needs none. Numbers written here are taken in the dtype of what stands beside them.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined, no-untyped-def"

INFINITY = float("inf")
ROOT_HALF = 0.7071067811865476
ROOT_2_PI = 2.5066282746310002
TANH = 0.7978845608028654  # sqrt(2 / pi)
CUBE = 0.044715


def add(x, y, alpha):
    return x + alpha * y


def mul(x, y):
    return x * y


def div(x, y):
    return x / y


def pow_int64(x, y):
    odd = y & 1
    result = where(y < 0, where(x == 1, 1, where(x == -1, 1 - 2 * odd, odd - odd)), odd - odd + 1)
    y = where(y < 0, 0, y)
    for _ in range(63):
        result = where((y & 1) == 1, result * x, result)
        x = x * x
        y = y >> 1
    return result


def addcmul(x, y, z, value):
    return x + value * y * z


def addcdiv(x, y, z, value):
    return x + value * y / z


def lerp(x, y, weight):
    return where(abs(weight) < 0.5, x + weight * (y - x), y - (y - x) * (1.0 - weight))


lerp_scalar = lerp


def clamp(x, least, most):
    return minimum(maximum(x, least), most)


def eq(x, y):
    return x == y


def ne(x, y):
    return x != y


def lt(x, y):
    return x < y


def le(x, y):
    return x <= y


def gt(x, y):
    return x > y


def ge(x, y):
    return x >= y


def isnan(x):
    return x != x


def isinf(x):
    return abs(x) == INFINITY


def isneginf(x):
    return x == -INFINITY


def isposinf(x):
    return x == INFINITY


def bitwise_and(x, y):
    return x & y


def bitwise_or(x, y):
    return x | y


def bitwise_xor(x, y):
    return x ^ y


def bitwise_not(x):
    return ~x


def neg(x):
    return -x


def sign(x):
    step = where(x > 0, 1, where(x < 0, -1, x))
    return where((x > 0) | (x < 0), step, 0)  # NaN and -0 become 0


def reciprocal(x):
    return 1.0 / x


def rsqrt(x):
    return 1.0 / sqrt(x)


def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


def relu(x):
    return where(x <= 0, 0, x)


def silu(x):
    return x / (1.0 + exp(-x))


def gelu(x):
    return x * 0.5 * (1.0 + erf(x * ROOT_HALF))


def gelu_tanh(x):
    return x * 0.5 * (1.0 + tanh(TANH * (x + CUBE * x * x * x)))


def softplus(x, beta, threshold):
    return where(x * beta > threshold, x, log1p(exp(x * beta)) / beta)


def sigmoid_backward(grad, y):
    return grad * (1.0 - y) * y


def tanh_backward(grad, y):
    return grad * (1.0 - y * y)


def silu_backward(grad, x):
    s = 1.0 / (1.0 + exp(-x))
    return grad * s * (1.0 + x * (1.0 - s))


def gelu_backward(grad, x):
    share = 0.5 * (1.0 + erf(x * ROOT_HALF))
    return grad * (share + x * exp(x * x * -0.5) / ROOT_2_PI)


def gelu_backward_tanh(grad, x):
    t = tanh(TANH * (x + CUBE * x * x * x))
    slope = TANH * (1.0 + 3.0 * CUBE * x * x)
    return grad * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)


def softplus_backward(grad, x, beta, threshold):
    return where(x * beta > threshold, grad, grad / (1.0 + exp(-(x * beta))))


def threshold_backward(grad, x, threshold):
    return where(x <= threshold, 0, grad)


def native_dropout_backward(grad, mask, scale):
    return grad * mask * scale
