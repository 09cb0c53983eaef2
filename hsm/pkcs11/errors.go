package pkcs11

import (
	"errors"
	"fmt"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// classify turns what the module (or crypto11 around it) said into an *hsm.Error. An error of no known meaning is
// ClassDevice: the process restarts, which is the one cure that works for every module.
func classify(op string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*hsm.Error](err); ok {
		return e
	}
	code, ok := errors.AsType[p11.Error](err)
	if !ok {
		return &hsm.Error{Class: hsm.ClassDevice, Op: op, Err: err}
	}
	return &hsm.Error{Class: classOf(code), Code: codeName(code), Op: op, Err: err}
}

// opaque is classify for operations on material that somebody else made. Modules answer a bad blob with
// CKR_GENERAL_ERROR and the like; that must neither end the process nor tell the sender what was wrong with it.
// Only what says plainly that session or device are gone keeps its class.
func opaque(op string, err error) error {
	e, ok := errors.AsType[*hsm.Error](classify(op, err))
	if !ok {
		return nil
	}
	switch code, _ := errors.AsType[p11.Error](err); uint(code) {
	case p11.CKR_GENERAL_ERROR, p11.CKR_FUNCTION_FAILED, p11.CKR_HOST_MEMORY, p11.CKR_DEVICE_MEMORY, p11.CKR_ENCRYPTED_DATA_INVALID,
		p11.CKR_ENCRYPTED_DATA_LEN_RANGE, p11.CKR_KEY_SIZE_RANGE:
		return hsm.Errorf(hsm.ClassRequest, op, "the wrapped key was refused")
	}
	if e.Class == hsm.ClassRequest {
		return hsm.Errorf(hsm.ClassRequest, op, "the wrapped key was refused")
	}
	return e
}

// asIs is classify for what the module said first, whatever class the error has got since.
func asIs(op string, err error) error {
	if code, ok := errors.AsType[p11.Error](err); ok {
		err = code
	}
	return classify(op, err)
}

func classOf(code p11.Error) hsm.Class {
	switch uint(code) {
	case p11.CKR_SESSION_CLOSED, p11.CKR_SESSION_HANDLE_INVALID, p11.CKR_SESSION_COUNT, p11.CKR_SESSION_PARALLEL_NOT_SUPPORTED,
		p11.CKR_SESSION_READ_ONLY, p11.CKR_SESSION_EXISTS, p11.CKR_OBJECT_HANDLE_INVALID, p11.CKR_KEY_HANDLE_INVALID,
		p11.CKR_WRAPPING_KEY_HANDLE_INVALID, p11.CKR_UNWRAPPING_KEY_HANDLE_INVALID, p11.CKR_USER_NOT_LOGGED_IN,
		p11.CKR_OPERATION_ACTIVE, p11.CKR_OPERATION_NOT_INITIALIZED:
		return hsm.ClassSession
	case p11.CKR_PIN_INCORRECT, p11.CKR_PIN_INVALID, p11.CKR_PIN_LEN_RANGE, p11.CKR_PIN_EXPIRED, p11.CKR_PIN_LOCKED,
		p11.CKR_USER_PIN_NOT_INITIALIZED:
		return hsm.ClassPIN
	case p11.CKR_MECHANISM_INVALID, p11.CKR_MECHANISM_PARAM_INVALID, p11.CKR_DATA_INVALID, p11.CKR_DATA_LEN_RANGE,
		p11.CKR_ARGUMENTS_BAD, p11.CKR_ATTRIBUTE_READ_ONLY, p11.CKR_ATTRIBUTE_SENSITIVE, p11.CKR_ATTRIBUTE_TYPE_INVALID,
		p11.CKR_ATTRIBUTE_VALUE_INVALID, p11.CKR_TEMPLATE_INCOMPLETE, p11.CKR_TEMPLATE_INCONSISTENT,
		p11.CKR_KEY_FUNCTION_NOT_PERMITTED, p11.CKR_KEY_NOT_WRAPPABLE, p11.CKR_KEY_UNEXTRACTABLE, p11.CKR_KEY_SIZE_RANGE,
		p11.CKR_KEY_TYPE_INCONSISTENT, p11.CKR_WRAPPED_KEY_INVALID, p11.CKR_WRAPPED_KEY_LEN_RANGE,
		p11.CKR_WRAPPING_KEY_SIZE_RANGE, p11.CKR_WRAPPING_KEY_TYPE_INCONSISTENT, p11.CKR_UNWRAPPING_KEY_SIZE_RANGE,
		p11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT, p11.CKR_ENCRYPTED_DATA_INVALID, p11.CKR_ENCRYPTED_DATA_LEN_RANGE,
		p11.CKR_DOMAIN_PARAMS_INVALID, p11.CKR_CURVE_NOT_SUPPORTED, p11.CKR_ACTION_PROHIBITED:
		return hsm.ClassRequest
	}
	return hsm.ClassDevice
}

func codeName(code p11.Error) string {
	if _, name, ok := strings.Cut(code.Error(), ": "); ok && name != "" {
		return name
	}
	return fmt.Sprintf("CKR_0x%X", uint(code))
}

func is(err error, code uint) bool {
	e, ok := errors.AsType[p11.Error](err)
	return ok && uint(e) == code
}
